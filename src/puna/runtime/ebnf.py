"""EBNF grammars (`root ::= ...`, as in llama.cpp's GBNF): parsing, checks, and the Lark text that llguidance compiles.

llguidance splits text into lexemes and always takes the longest one, so a grammar means what it says only if no lexeme
can swallow the beginning of what follows it. `puna.runtime.lexemes` cuts it such that none can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from puna.runtime.lexemes import Chars, Lexemes, Node, Ref, Repeat, alt, seq

MAX_NESTING = 100
MAX_RULES = 500
MAX_REPEATS = 10_000
_TOKEN = re.compile(
    r"(?P<space>(?:[ \t\r\n]|\#[^\n]*)+)|(?P<rule>[A-Za-z0-9_-]+)(?=(?:[ \t\r\n]|\#[^\n]*)*::=)|(?P<define>::=)"
    r"|(?P<name>[A-Za-z0-9_-]+)|(?P<text>\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*')|(?P<chars>\[(?:[^\]\\\n]|\\.)*\])"
    r"|(?P<counts>\{\s*\d+\s*(?:,\s*\d*\s*)?\})|(?P<mark>[|()*+?.])"
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|([^\\])", re.DOTALL)
_LETTERS = (("n", "\n"), ("r", "\r"), ("t", "\t"))


@dataclass(frozen=True)
class Grammar:
    """Rules by name. Every rule that is named is there, every one can come to an end, and `root` is among them."""

    rules: Mapping[str, Node]

    @classmethod
    def parse(cls, text: str) -> Grammar:
        """Raises ValueError, with the line, for what is no EBNF, undefined rules, and rules that can never end."""
        rules = _Parser(text).parse()
        if len(rules) > MAX_RULES:
            raise ValueError(f"the grammar has {len(rules)} rules, more than the {MAX_RULES} allowed")
        if "root" not in rules:
            raise ValueError("the grammar has no rule 'root': expected 'root ::= ...'")
        for name, node in rules.items():
            for ref in references(node):
                if ref not in rules:
                    raise ValueError(f"the grammar's rule {name!r} names {ref!r}, which has no rule")
        ends: set[str] = set()
        while new := {name for name, node in rules.items() if name not in ends and _ends(node, ends)}:
            ends |= new
        reached = _reachable("root", rules)
        endless = sorted(reached - ends)
        if endless:
            raise ValueError(f"the grammar's rules {endless} can never come to an end: each text would need another")
        return cls({name: node for name, node in rules.items() if name in reached})

    def to_lark(self) -> str:
        """The lines of a Lark grammar with the rule `start`. Raises ValueError for rules nested too deeply."""
        reach = {name: _reachable(name, self.rules) for name in self.rules}
        recursive = {name for name, node in self.rules.items() if any(name in reach[ref] for ref in references(node))}
        try:
            return "\n".join(Lexemes(self.rules, {name for name in self.rules if reach[name] & recursive}).lark_lines())
        except RecursionError as error:
            raise ValueError("the grammar's rules name one another too deeply: put some of them into one") from error


def references(node: Node) -> Iterator[str]:
    if isinstance(node, Ref):
        yield node.name
    elif not isinstance(node, Chars):
        for child in node.children:
            yield from references(child)


def _reachable(name: str, rules: Mapping[str, Node]) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(references(rules[name]))
    return found


def _ends(node: Node, ends: set[str]) -> bool:
    if isinstance(node, Ref):
        return node.name in ends
    if isinstance(node, Chars):
        return bool(node.ranges)
    if isinstance(node, Repeat):
        return node.least == 0 or _ends(node.children[0], ends)
    results = [_ends(child, ends) for child in node.children]
    return any(results) if node.is_choice else all(results)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str, int]] = []
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error(position, f"cannot read {text[position : position + 20]!r}")
            if match.lastgroup != "space":
                self._tokens.append((str(match.lastgroup), match.group(), position))
            position = match.end()
        self._tokens.append(("end", "", len(text)))
        self._next = 0

    def parse(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        while self._kind() != "end":
            kind, name, position = self._take()
            if kind != "rule":
                raise self._error(position, f"expected 'name ::= ...', found {name!r}")
            if name in rules:
                raise self._error(position, f"a second rule {name!r}")
            self._take()
            rules[name] = self._choice(0)
            if self._kind() not in ("rule", "end"):
                raise self._error(self._tokens[self._next][2], f"{self._tokens[self._next][1]!r} is out of place")
        return rules

    def _choice(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise self._error(self._tokens[self._next][2], f"parentheses nested deeper than {MAX_NESTING}")
        choices = [self._sequence(depth)]
        while self._tokens[self._next][1] == "|" and self._kind() == "mark":
            self._take()
            choices.append(self._sequence(depth))
        return alt(choices)

    def _sequence(self, depth: int) -> Node:
        items: list[Node] = []
        while self._kind() in ("name", "text", "chars", "mark") and self._tokens[self._next][1] not in ("|", ")"):
            kind, value, position = self._take()
            if kind == "name":
                item: Node = Ref(value)
            elif kind == "text":
                item = seq([Chars(((point, point),)) for point in self._points(value[1:-1], position)])
            elif kind == "chars":
                item = self._chars(value[1:-1], position)
            elif value == ".":
                item = Chars.excluding(())
            elif value == "(":
                item = self._choice(depth + 1)
                if self._take()[1] != ")":
                    raise self._error(position, "'(' without ')'")
            else:
                raise self._error(position, f"{value!r} follows nothing that it could repeat")
            items.append(self._repeated(item))
        return seq(items)

    def _repeated(self, item: Node) -> Node:
        while self._kind() == "counts" or (self._kind() == "mark" and self._tokens[self._next][1] in "*+?"):
            kind, value, position = self._take()
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(value, (0, None))
            if kind == "counts":
                numbers = [part.strip() for part in value[1:-1].split(",")]
                least = int(numbers[0])
                most = int(numbers[-1]) if numbers[-1] else None
            if max(least, most or 0) > MAX_REPEATS or (most is not None and most < max(least, 1)):
                raise self._error(position, f"{value} repetitions: at most {MAX_REPEATS}, and the larger number last")
            item = Repeat((item,), least, most)
        return item

    def _points(self, text: str, position: int) -> list[int]:
        points = []
        for match in _ESCAPE.finditer(text):
            *hexadecimal, escaped, plain = match.groups()
            digits = next((group for group in hexadecimal if group), None)
            if digits is not None:
                points.append(int(digits, 16))
            elif escaped is not None:
                if escaped.isalnum() and escaped not in dict(_LETTERS):
                    raise self._error(position, f"unknown escape '\\{escaped}'")
                points.append(ord(dict(_LETTERS).get(escaped, escaped)))
            else:
                points.append(ord(plain))
        for point in points:
            if point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
                raise self._error(position, f"U+{point:04X} is no character")
        return points

    def _chars(self, text: str, position: int) -> Chars:
        negated = text.startswith("^")
        parts = [match.group() for match in _ESCAPE.finditer(text[1:] if negated else text)]
        ranges: list[tuple[int, int]] = []
        while parts:
            first = last = self._points(parts.pop(0), position)[0]
            # A hyphen at the end stands for itself.
            if len(parts) >= 2 and parts[0] == "-":
                last = self._points(parts[1], position)[0]
                del parts[:2]
            if last < first:
                raise self._error(position, f"the range {chr(first)}-{chr(last)} is upside down")
            ranges.append((first, last))
        if not ranges:
            raise self._error(position, f"[{text}] has no characters")
        return Chars.excluding(ranges) if negated else Chars.of(ranges)

    def _kind(self) -> str:
        return self._tokens[self._next][0]

    def _take(self) -> tuple[str, str, int]:
        token = self._tokens[self._next]
        self._next = min(self._next + 1, len(self._tokens) - 1)
        return token

    def _error(self, position: int, what: str) -> ValueError:
        return ValueError(f"the grammar, line {self._text.count(chr(10), 0, position) + 1}: {what}")
