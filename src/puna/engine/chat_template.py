"""Chat templates: messages to prompt text, rendered in jinja2's sandbox with the helpers that checkpoints expect.

What a template may use, and how its whitespace is treated, follows transformers' `apply_chat_template`. A template
comes with a checkpoint and is not trusted: it sees plain data only, cannot reach attributes of Python objects, and what
it can build is bounded.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Far above any context window (about 4 million tokens), far below what would exhaust memory.
_MAX_CHARS = 1 << 24
_MAX_EXPONENT = 1000
# Of one rendering, in seconds of this thread's own: the longest conversations take some hundredths.
_MAX_SECONDS = 5.0
_COUNTED = "puna counted"  # a filter that no template can name
# The space at the end tells whether the template strips the end of the message.
_END_MARK = "PUNA_END_OF_FINAL_MESSAGE "
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt")


class _GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's text for training; for a prompt it is its body."""

    tags = {"generation"}  # noqa: RUF012 (an instance attribute by jinja2's types)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block and not the bare body, since names that the body sets must not be seen outside of it.
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    @staticmethod
    def _render(caller: Callable[[], str]) -> str:
        return caller()


class _PublicNamespace(Namespace):
    """jinja2's `namespace` without underscore names, which would be a way around the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is positional only so that a template can have an attribute of that name.
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_attribute(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute cannot be named {name!r}")


class _Watch:
    """When a rendering began, for each thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def start(self) -> None:
        self._local.deadline = time.thread_time() + _MAX_SECONDS

    def check(self) -> None:
        if time.thread_time() > self._local.deadline:
            raise SecurityError(f"more than {_MAX_SECONDS} seconds of work")


class _Counted:
    """What a loop goes over; the watch is looked at before each element."""

    def __init__(self, values: Iterable[Any], watch: _Watch) -> None:
        self._values = values
        self._watch = watch

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._watch.check()
            yield value

    def __len__(self) -> int:  # as `loop.length` asks; a TypeError where there is none
        return len(self._values)  # type: ignore[arg-type]


class _Environment(ImmutableSandboxedEnvironment):
    # `+`, `*`, `**` and `%` can make a huge value out of a short template.
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
        self.watch = _Watch()
        self.filters[_COUNTED] = lambda values: _Counted(values, self.watch)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        # The type itself would give templates its class attributes.
        self.globals["dict"] = _make_dict
        self.globals["namespace"] = _PublicNamespace
        self.filters["tojson"] = _to_json

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Also puts the watch around what each loop goes over: nothing else can stop a loop that writes nothing."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.watch.check()  # a macro may call itself
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            can_grow = isinstance(left, (str, list, tuple)) and type(left) is type(right)
            if can_grow and len(left) + len(right) > _MAX_CHARS:
                raise SecurityError(f"a text or list of more than {_MAX_CHARS} elements")
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                too_long = isinstance(count, int) and isinstance(sequence, (str, list, tuple))
                if too_long and len(sequence) * count > _MAX_CHARS:
                    raise SecurityError(f"a repetition of more than {_MAX_CHARS} elements")
        elif operator == "**" and isinstance(right, (int, float)) and abs(right) > _MAX_EXPONENT:
            raise SecurityError(f"an exponent above {_MAX_EXPONENT}")
        elif operator == "%" and isinstance(left, str) and any(len(run) > 6 for run in _digit_runs(left)):
            raise SecurityError("a format with a width of more than six digits")
        return super().call_binop(context, operator, left, right)


def _digit_runs(text: str) -> list[str]:
    return "".join(character if character.isdigit() else " " for character in text).split()


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Any, where: str) -> Any:
    """A copy made of exact JSON types, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    raise ValueError(f"{where} hold a {type(value).__name__}; a chat template takes JSON values only")


class ChatTemplate:
    """The chat templates of a checkpoint, compiled.

    Args:
        templates: source by name: `default`, and optionally `tool_use` for conversations with tools, and others.
        special_tokens: variables such as `bos_token` that the template can use.

    Raises ValueError if a template does not compile.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = self._environment = _Environment()
        self._sources = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._compiled = {}
        for name, source in templates.items():
            try:
                self._compiled[name] = environment.from_string(source)
            except TemplateSyntaxError as error:
                raise _syntax_error(name, error) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: dicts with `role` and `content` and what else the template knows; keys that are None are dropped.
            tools: JSON schemas of the functions the model may call.
            add_generation_prompt: end with the header of the assistant's next message.
            continue_final_message: end inside the last message, for the model to continue it.
            template_variables: more variables for the template; they win over the special tokens.

        Raises ValueError for a conversation that the template refuses (with its message) or that is malformed.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt=False: the last message is not over")
        chat = _copy_messages(messages)
        if not all(isinstance(tool, Mapping) for tool in tools or ()):
            raise ValueError("tools must be JSON schemas (dicts)")
        variables = _plain(dict(template_variables or {}), "template_variables")
        reserved = [name for name in _RESERVED_VARIABLES if name in variables]
        if reserved:
            raise ValueError(f"template_variables cannot set {reserved[0]!r}; it has an argument of its own")
        name = self._select(tools)
        final_text = _mark_end(chat[-1], self._sources[name]) if continue_final_message else ""
        text = self._render(
            name,
            {
                "documents": None,
                **self._special_tokens,
                **variables,
                "messages": chat,
                "tools": None if tools is None else _plain(list(tools), "tools"),
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut_at_mark(text, final_text) if continue_final_message else text

    def mentions(self, text: str) -> bool:
        """Whether any of the templates has this in its source: a mark that it writes or looks for, or a variable."""
        return any(text in source for source in self._sources.values())

    def _select(self, tools: object) -> str:
        if tools is not None and "tool_use" in self._sources:
            return "tool_use"
        if "default" not in self._sources:
            raise ValueError(f"no chat template is named 'default'; there are {sorted(self._sources)}")
        return "default"

    def _render(self, name: str, variables: dict[str, Any]) -> str:
        parts, num_chars = [], 0
        self._environment.watch.start()
        try:
            for part in self._compiled[name].generate(variables):
                num_chars += len(part)
                if num_chars > _MAX_CHARS:
                    raise SecurityError(f"more than {_MAX_CHARS} characters of output")
                parts.append(part)
        except SecurityError as error:
            raise ValueError(f"the chat template does what the sandbox forbids: {error}") from error
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error.message}") from error
        except OverflowError as error:
            raise ValueError(f"the chat template exceeds a limit ({MAX_RANGE} elements of a range): {error}") from error
        except (TypeError, AttributeError, ArithmeticError, LookupError, RecursionError, ValueError) as error:
            raise ValueError(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error
        return "".join(parts)


def check_syntax(name: str, source: str) -> None:
    """Parses a template without compiling it, which would already compute what is constant in it.

    Raises ValueError if it is none.
    """
    try:
        _Environment().parse(source)
    except TemplateSyntaxError as error:
        raise _syntax_error(name, error) from error
    except RecursionError:
        raise ValueError(f"the chat template {name!r} does not compile: it is nested too deeply") from None


def _syntax_error(name: str, error: TemplateSyntaxError) -> ValueError:
    return ValueError(f"the chat template {name!r} does not compile: line {error.lineno}: {error.message}")


def _copy_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError("messages must be a list of at least one message such as {'role': 'user', 'content': 'Hi'}")
    chat: list[dict[str, Any]] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"a message must be a dict with 'role' and 'content', not {message!r}")
        copy = {key: _plain(value, "messages") for key, value in message.items() if value is not None}
        reasoning = next((copy[key] for key in _REASONING_KEYS if key in copy), None)
        if reasoning is not None:
            # Templates read a model's reasoning under either of two names.
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        chat.append(copy)
    return chat


def _mark_end(message: dict[str, Any], source: str) -> str:
    """Puts the mark after the message's text, and returns that text."""
    if "content" not in source:
        raise ValueError("continue_final_message: the chat template does not use the content of messages")
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_MARK
        return content
    for block in reversed(content if isinstance(content, list) else []):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text: str = block["text"]
            block["text"] = text + _END_MARK
            return text
    raise ValueError("continue_final_message: the final message has no text to continue")


def _cut_at_mark(text: str, final_text: str) -> str:
    position = text.rfind(_END_MARK.strip())
    if position < 0 or final_text.strip() not in text:
        raise ValueError("continue_final_message: the chat template leaves out (a part of) the final message")
    if text.startswith(_END_MARK, position):
        return text[:position]
    # The template strips messages, so what the message ended with goes too.
    return text[:position].rstrip()
