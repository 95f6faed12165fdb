"""Calls in a model's text: parsers that take it piece by piece and tell a call as soon as it is sure to be one."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

T = TypeVar("T")
# A parser's routine: it yields where it needs more text.
_Reads = Generator[None, None, T]

CALL_OPEN: Final = "<tool_call>"
CALL_CLOSE: Final = "</tool_call>"
TOOL_CALLS: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
PYTHON_TAG: Final = "<|python_tag|>"
_MOST_CHARS: Final = 200_000  # of a text that is read as Python
_SPACE: Final = " \t\r\n"
_STRING_RUN: Final = re.compile(r'[^"\\]+')
_SCALAR_RUN: Final = re.compile(r"[A-Za-z0-9+.\-]+")
_NAME_RUN: Final = re.compile(r"[a-zA-Z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the arguments of the call that started last; joined they are JSON as the model wrote it."""

    text: str


Event = Content | CallStart | Arguments


class ToolParser:
    """For one answer. Takes a text piece by piece; the joined events do not depend on how it is cut.

    A call starts once its name is known to be one of `names` and its arguments begin. What is no call, or a call of
    another name, is content, with the marks around it; so is what stands before and after calls, without the white
    space beside them. Arguments that break off, or are no JSON, stay those of their call.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._text = ""  # from the last thing on that is settled
        self._at = 0
        self._has_ended = False
        self._has_call = False
        self._in_arguments = False
        self._events: list[Event] = []
        self._routine = self._read()

    def push(self, text: str) -> list[Event]:
        self._text += text
        return self._run()

    def flush(self) -> list[Event]:
        """No more text comes."""
        self._has_ended = True
        return self._run()

    def _run(self) -> list[Event]:
        next(self._routine, None)
        if self._in_arguments:
            self._tell_arguments()
        events, self._events = self._events, []
        return events

    def _read(self) -> _Reads[None]:
        raise NotImplementedError

    # ---- what is settled

    def _settle(self) -> str:
        """All that was read; it will not be looked at again."""
        settled, self._text, self._at = self._text[: self._at], self._text[self._at :], 0
        return settled

    def _tell_content(self) -> None:
        text = self._settle()
        if text:
            self._events.append(Content(text))

    def _tell_arguments(self) -> None:
        text = self._settle()
        if text:
            self._events.append(Arguments(text))

    def _start_call(self, name: str) -> None:
        self._settle()
        self._has_call = True
        self._events.append(CallStart(name))

    # ---- reading

    def _peek(self) -> _Reads[str]:
        """The next character; empty at the end."""
        while self._at == len(self._text) and not self._has_ended:
            yield
        return self._text[self._at : self._at + 1]

    def _takes(self, mark: str) -> _Reads[bool]:
        """Whether this comes now; then it has been read."""
        while True:
            found = self._text[self._at : self._at + len(mark)]
            if found == mark:
                self._at += len(mark)
                return True
            if self._has_ended or not mark.startswith(found):
                return False
            yield

    def _skip_space(self, also: str = "") -> _Reads[None]:
        while (character := (yield from self._peek())) and character in _SPACE + also:
            self._at += 1

    def _run_of(self, pattern: re.Pattern[str]) -> _Reads[None]:
        while (yield from self._peek()):
            match = pattern.match(self._text, self._at)
            if match is None:
                return
            self._at = match.end()

    def _content_until(self, mark: str) -> _Reads[bool]:
        """Tells what stands before the mark, but for white space at its end; False where the text ends first."""
        while True:
            place = self._text.find(mark, self._at)
            sure = place if place >= 0 else len(self._text) - overlap(self._text, mark) * (not self._has_ended)
            self._at = len(self._text[:sure].rstrip(_SPACE))
            self._tell_content()
            if place >= 0:
                return True
            if self._has_ended:
                return False
            yield

    def _content_to_end(self) -> _Reads[None]:
        """All of it, but for white space at the end of a text with calls."""
        while True:
            self._at = len(self._text.rstrip(_SPACE) if self._has_call else self._text)
            self._tell_content()
            if self._has_ended:
                return
            yield

    def _string(self) -> _Reads[str | None]:
        """The value of a string of JSON; None where none is, or it breaks off."""
        begin = self._at
        if not (yield from self._raw_string()):
            return None
        try:
            value: str = json.loads(self._text[begin : self._at], strict=False)
        except ValueError:
            return None
        return value

    def _raw_string(self) -> _Reads[bool]:
        if not (yield from self._takes('"')):
            return False
        while True:
            yield from self._run_of(_STRING_RUN)
            character = yield from self._peek()
            if not character:
                return False
            self._at += 1
            if character == '"':
                return True
            if not (yield from self._peek()):  # behind a backslash
                return False
            self._at += 1

    def _value(self) -> _Reads[bool]:
        """Reads a value of JSON, loosely: brackets that close, strings, and what numbers and names are made of."""
        depth = 0
        while True:
            character = yield from self._peek()
            if character == '"':
                if not (yield from self._raw_string()):
                    return False
            elif character and character in "{[":
                depth += 1
                self._at += 1
                continue
            elif character and character in "}]":
                depth -= 1
                self._at += 1
            elif depth and character and character in ",:" + _SPACE:
                self._at += 1
            elif _SCALAR_RUN.match(character):
                yield from self._run_of(_SCALAR_RUN)
            else:
                return False
            if depth <= 0:
                return depth == 0

    def _arguments(self) -> _Reads[bool]:
        """An object, told as it comes. False where it breaks off, or is none."""
        self._settle()
        self._in_arguments = True
        is_whole = yield from self._value()
        self._in_arguments = False
        self._tell_arguments()
        return is_whole

    def _call(self) -> _Reads[bool]:
        """An object with a name and arguments; whether a call was told."""
        if not (yield from self._takes("{")):
            return False
        name: str | None = None
        held: str | None = None  # arguments that came before the name
        was_told = False
        while True:
            yield from self._skip_space()
            key = yield from self._string()
            yield from self._skip_space()
            if key is None or not (yield from self._takes(":")):
                return was_told
            yield from self._skip_space()
            first = yield from self._peek()
            begin = self._at
            if key == "name" and not was_told:
                name = yield from self._string()
                if name not in self._names:
                    return False
            elif key in ("arguments", "parameters") and not was_told and held is None and first and first in '{"':
                if first == '"':  # JSON within a string of JSON
                    held = yield from self._string()
                elif name is not None:
                    self._start_call(name)
                    was_told = True
                    if not (yield from self._arguments()):
                        return True
                else:
                    held = self._text[begin : self._at] if (yield from self._value()) else None
                if held is None and not was_told:
                    return False
            elif not (yield from self._value()):
                return was_told
            if name is not None and held is not None and not was_told:
                self._start_call(name)
                was_told = True
                self._events.append(Arguments(held))
            yield from self._skip_space()
            if not (yield from self._takes(",")):
                yield from self._takes("}")
                return was_told

    def _calls(self, between: str) -> _Reads[bool]:
        """A call, or calls with one of `between` and white space between, or a list of them. Whether one was told.

        It ends before what is none.
        """
        is_list = yield from self._takes("[")
        was_told = False
        while True:
            before = self._at
            yield from self._skip_space("," if is_list else between)
            if is_list and was_told and (yield from self._takes("]")):
                self._settle()
                return True
            if not (yield from self._call()):
                self._at = before  # nothing was settled since
                return was_told
            self._settle()
            was_told = True

    def _named_call(self) -> _Reads[bool]:
        """A name, marks, and its arguments: Mistral's later way."""
        begin = self._at
        yield from self._run_of(_NAME_RUN)
        name = self._text[begin : self._at]
        if (yield from self._takes(CALL_ID)):
            yield from self._run_of(_NAME_RUN)
        yield from self._takes(ARGS)
        yield from self._skip_space()
        if name not in self._names or (yield from self._peek()) != "{":
            return False
        self._start_call(name)
        yield from self._arguments()
        return True


class HermesParser(ToolParser):
    """Calls between tags, with text before and after. Some models leave out the last tag."""

    def _read(self) -> _Reads[None]:
        while (yield from self._content_until(CALL_OPEN)):
            yield from self._skip_space()
            yield from self._takes(CALL_OPEN)
            behind = self._at
            yield from self._skip_space()
            if (yield from self._calls(",;")):
                end = self._at
                yield from self._skip_space()
                if not (yield from self._takes(CALL_CLOSE)):
                    self._at = end
                self._settle()
            else:
                self._at = behind
                self._tell_content()
        yield from self._content_to_end()


class MistralParser(ToolParser):
    """Calls behind a mark: a list of them, or one with its name first; text before."""

    def _read(self) -> _Reads[None]:
        while (yield from self._content_until(TOOL_CALLS)):
            yield from self._skip_space()
            yield from self._takes(TOOL_CALLS)
            behind = self._at
            yield from self._skip_space()
            is_json = (yield from self._peek()) in ("[", "{")
            if not (yield from (self._calls(",;") if is_json else self._named_call())):
                self._at = behind
                self._tell_content()
        yield from self._content_to_end()


class LlamaParser(ToolParser):
    """Calls that are the text, from its beginning on, or behind a tag; `pythonic`: also a list of calls as Python."""

    def __init__(self, names: frozenset[str], pythonic: bool) -> None:
        super().__init__(names)
        self._pythonic = pythonic

    def _read(self) -> _Reads[None]:
        was_told = True
        while was_told:
            begin = self._at
            yield from self._skip_space()
            yield from self._takes(PYTHON_TAG)
            yield from self._skip_space()
            if self._pythonic and not self._has_call and (yield from self._is_python()):
                yield from self._python()
                return
            was_told = (yield from self._peek()) in ("[", "{") and (yield from self._calls(";,"))
        self._at = begin
        yield from self._content_to_end()

    def _is_python(self) -> _Reads[bool]:
        """Whether a list comes that begins with a call; it is not read yet."""
        begin = self._at
        if not (yield from self._takes("[")):
            return False
        yield from self._skip_space()
        name_begin = self._at
        yield from self._run_of(_NAME_RUN)
        name = self._text[name_begin : self._at]
        is_call = name in self._names and (yield from self._takes("("))
        self._at = begin
        return is_call

    def _python(self) -> _Reads[None]:
        """What the list holds shows at its end."""
        begin = self._at
        while not self._has_ended:
            yield
        calls = python_calls(self._text[begin:], self._names)
        self._at = len(self._text)
        for name, arguments in calls:
            self._start_call(name)
            self._events.append(Arguments(arguments))
        if not calls:
            self._tell_content()


class ForcedParser(ToolParser):
    """Of a text that is held to a list of calls and has nothing else. There is no content: a call that breaks off
    before its arguments begin is dropped, as half a name is of use to nobody."""

    def _read(self) -> _Reads[None]:
        yield from self._skip_space()
        yield from self._calls(",")


def overlap(text: str, mark: str) -> int:
    """How much of the text's end may be the beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def python_calls(text: str, names: frozenset[str]) -> list[tuple[str, str]]:
    """Names and arguments of [name(key=value, ...), ...] with literals; empty for anything else. Nothing is run."""
    if len(text) > _MOST_CHARS:
        return []
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        calls = []
        for node in tree.elts:
            if not isinstance(node, ast.Call) or node.args or ast.unparse(node.func) not in names:
                return []
            given = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
            if len(given) < len(node.keywords):
                return []
            calls.append((ast.unparse(node.func), json.dumps(given, ensure_ascii=False, allow_nan=False)))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []
    return calls


def _literal(node: ast.expr) -> Any:
    """Python's literals, and JSON's names for three of them. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        if not all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in node.keys):
            raise ValueError("keys of JSON are texts")
        return {
            ast.literal_eval(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key
        }
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("not a value of JSON")
    return value
