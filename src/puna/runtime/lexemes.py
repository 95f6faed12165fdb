"""Grammar nodes, and how a grammar falls into lexemes such that taking the longest lexeme never takes too much.

Lexemes are as large as they can be without recursion at first. For every two lexemes A and B that may begin at one
place, both automata are then walked together: where A is complete and B could go on, no byte that B may go on with may
also begin what follows A. Lexemes that fail are split into their parts, down to single characters if need be: one
character is never longer than another that begins like it.

Two lexemes may begin at one place if both may begin the text, or if they follow two that may and that have a text in
common. Each place of a lexeme in the grammar counts for itself here: a quote that opens is not one that closes.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

# What is not examined within these bounds is split, which makes masks slower (some milliseconds on a large vocabulary)
# and not wrong. Compiling the worst grammars we found takes a few seconds with them.
MAX_STATES = 2_000  # of one lexeme's automaton
MAX_PAIRS = 500_000  # of lexemes tried for whether they may begin at one place, for the whole grammar
MAX_WALK = 10_000  # pairs of states, for the whole grammar
_SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True)
class Chars:
    """One character out of sorted, disjoint, inclusive ranges of code points."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Chars:
        merged: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return cls(tuple(merged))

    @classmethod
    def excluding(cls, ranges: Iterable[tuple[int, int]]) -> Chars:
        kept = []
        start = 0
        for first, last in cls.of([*ranges, _SURROGATES]).ranges:
            if first > start:
                kept.append((start, first - 1))
            start = last + 1
        if start <= 0x10FFFF:
            kept.append((start, 0x10FFFF))
        return cls(tuple(kept))

    def to_lark(self, write: Callable[[Node], str]) -> str:
        return "/[" + "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in self.ranges) + "]/"


@dataclass(frozen=True)
class Ref:
    name: str


@dataclass(frozen=True)
class Repeat:
    children: tuple[Node]
    least: int
    most: int | None

    def to_lark(self, write: Callable[[Node], str]) -> str:
        inner = f"({write(self.children[0])})"
        if (self.least, self.most) in ((0, None), (1, None), (0, 1)):
            return inner + {(0, None): "*", (1, None): "+", (0, 1): "?"}[self.least, self.most]
        return inner + "{" + f"{self.least}," + ("" if self.most is None else str(self.most)) + "}"


@dataclass(frozen=True)
class Group:
    """All of the children in order, or one of them."""

    children: tuple[Node, ...]
    is_choice: bool

    def to_lark(self, write: Callable[[Node], str]) -> str:
        if not self.children:
            return '""'
        return "(" + (" | " if self.is_choice else " ").join(map(write, self.children)) + ")"


Node = Chars | Ref | Repeat | Group


def seq(items: Sequence[Node]) -> Node:
    return items[0] if len(items) == 1 else Group(tuple(items), is_choice=False)


def alt(items: Sequence[Node]) -> Node:
    return items[0] if len(items) == 1 else Group(tuple(items), is_choice=True)


EMPTY = Group((), is_choice=False)


def _lead_bytes(first: int, last: int) -> range:
    """The bytes that UTF-8 characters of a range begin with."""
    return range(chr(first).encode("utf-8")[0], chr(last).encode("utf-8")[0] + 1)


class _Shape(NamedTuple):
    """Of a node: whether it can be empty, and which lexemes it can begin and end with."""

    nullable: bool
    first: frozenset[int]
    last: frozenset[int]


@dataclass
class _Automaton:
    """Non-deterministic: `moves[state]` are (ranges, target), `jumps[state]` need no character. 0 is the start."""

    moves: list[list[tuple[Chars, int]]] = field(default_factory=list)
    jumps: list[list[int]] = field(default_factory=list)
    end: int = 0
    steps: int = 0

    def count_step(self) -> None:
        # Empty parts add no states and can still be exponentially many.
        self.steps += 1
        if self.steps > 4 * MAX_STATES:
            raise _TooLargeError

    def add(self) -> int:
        if len(self.moves) >= MAX_STATES:
            raise _TooLargeError
        self.moves.append([])
        self.jumps.append([])
        return len(self.moves) - 1

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        found: set[int] = set()
        waiting = list(states)
        while waiting:
            state = waiting.pop()
            if state not in found:
                found.add(state)
                waiting.extend(self.jumps[state])
        return frozenset(found)

    def after(self, states: AbstractSet[int], point: int) -> frozenset[int]:
        return self.closure(
            target for state in states for chars, target in self.moves[state] if _contains(chars, point)
        )

    def first_bytes(self) -> set[int]:
        return self.lead_bytes(self.closure([0]))

    def lead_bytes(self, states: AbstractSet[int]) -> set[int]:
        return {
            byte
            for state in states
            for chars, _ in self.moves[state]
            for first, last in chars.ranges
            for byte in _lead_bytes(first, last)
        }


class _TooLargeError(Exception):
    pass


def _contains(chars: Chars, point: int) -> bool:
    index = bisect_right(chars.ranges, (point, 0x110000)) - 1
    return index >= 0 and chars.ranges[index][1] >= point


class Lexemes:
    """A grammar cut into lexemes, as the lines of a Lark grammar for llguidance.

    irregular: the rules that name themselves, directly or through others, or name such a rule.
    """

    def __init__(self, rules: Mapping[str, Node], irregular: AbstractSet[str]) -> None:
        self._rules = rules
        self._irregular = irregular
        self._numbers = {name: i for i, name in enumerate(rules)}
        self._nullable_rules: dict[str, bool] = {}
        # Every lexeme there ever was, by number: nodes are slow to hash.
        self._lexemes: list[Node] = []
        self._lexeme_numbers: dict[Node, int] = {}
        self._automata: list[_Automaton | None] = []  # None: too large to examine
        self._share_text_memo: dict[tuple[int, int], bool] = {}
        self._steps_left = MAX_WALK
        self._pairs_left = MAX_PAIRS
        self._splits: set[int] = set()
        self._cut_all()
        while found := self._conflicting():
            self._splits |= found
            self._cut_all()

    def lark_lines(self) -> list[str]:
        lines = [f"start: {self._rule_name('root')}"]
        lines += [f"{self._rule_name(name)}: {self._write_rule(node)}" for name, node in self._cut.items()]
        for i in sorted(set(self._places)):
            node = self._lexemes[i]
            # A lexeme that may be empty is an optional one that may not.
            not_empty = " & /(?s:.+)/" if self._is_nullable(node) else ""
            lines.append(f"L{i}: ({self._write_terminal(node)}){not_empty}")
        return lines + [
            f"T{i}: {self._write_terminal(self._rules[name])}"
            for name, i in self._numbers.items()
            if name not in self._irregular
        ]

    def _cut_all(self) -> None:
        self._places: list[int] = []  # the lexeme at each place
        self._cut: dict[str, Node] = {}
        # Rules of lexemes that were split are rules of their own, marked with '~'.
        waiting = ["root", *(name for name in self._rules if name in self._irregular)]
        while waiting:
            name = waiting.pop()
            if name not in self._cut:
                body = self._rules[name.removeprefix("~")]
                self._cut[name] = node = self._open(body) if name.startswith("~") else self._cut_node(body)
                waiting += _split_rules(node)

    def _conflicting(self) -> set[int]:
        """Lexemes that must be split, because the longest one could be too long."""
        if not self._irregular:
            return set()  # One lexeme is the whole text.
        # Two single characters are never in conflict, so there is always something to split.
        splittable = {i for i in self._places if not isinstance(self._lexemes[i], Chars)}
        too_large = {i for i in splittable if self._automata[i] is None}
        if too_large or self._steps_left <= 0:
            return too_large or splittable
        first, followers = self._neighbours()
        begins = {i: self._automaton(i).first_bytes() for i in set(self._places)}
        after = {
            place: frozenset(byte for i in {self._places[f] for f in following} for byte in begins[i])
            for place, following in followers.items()
        }
        checks = {
            (self._places[one], self._places[other], after[one])
            for pair in self._together(first, followers)
            for one, other in (pair, pair[::-1])
            if after[one]
        }
        found = {i for a, b, following in checks if self._walk_together(a, b, following) for i in (a, b)}
        return splittable if self._steps_left <= 0 else found & splittable

    def _together(self, first: AbstractSet[int], followers: Mapping[int, AbstractSet[int]]) -> set[tuple[int, int]]:
        """The pairs of places that may begin at one point of a text. Uses up the steps if there are too many."""
        pairs: set[tuple[int, int]] = set()
        waiting: list[tuple[int, int]] = []

        def add(begin_a: AbstractSet[int], begin_b: AbstractSet[int]) -> None:
            self._pairs_left -= len(begin_a) * len(begin_b)
            if self._pairs_left < 0:
                self._steps_left = 0
                return
            new = {(min(a, b), max(a, b)) for a in begin_a for b in begin_b} - pairs
            pairs.update(new)
            waiting.extend(new)

        add(first, first)
        while waiting and self._steps_left > 0:
            c, d = waiting.pop()
            if self._share_text(self._places[c], self._places[d]):
                add(followers[c], followers[d])
        return pairs

    def _is_regular(self, node: Node) -> bool:
        if isinstance(node, Chars):
            return True
        if isinstance(node, Ref):
            return node.name not in self._irregular
        return all(self._is_regular(child) for child in node.children)

    def _cut_node(self, node: Node) -> Node:
        """The node with lexemes replaced by references to their places ('#0' and so on)."""
        if node == EMPTY or (isinstance(node, Ref) and not self._is_regular(node)):
            return node
        if self._is_regular(node):
            number = self._number(node)
            if number in self._splits:
                return self._open(node)
            lexeme = Ref(f"#{len(self._places)}")
            self._places.append(number)
            return Repeat((lexeme,), 0, 1) if self._is_nullable(node) else lexeme
        if isinstance(node, Group) and node.is_choice:
            regular = [child for child in node.children if self._is_regular(child)]
            others = [self._cut_node(child) for child in node.children if not self._is_regular(child)]
            return alt([*([self._cut_node(alt(regular))] if regular else []), *others])
        if isinstance(node, Group):
            parts: list[Node] = []
            for is_regular, group in itertools.groupby(node.children, self._is_regular):
                children = list(group)
                parts += [self._cut_node(child) for child in ([seq(children)] if is_regular else children)]
            return seq(parts)
        return self._open(node)

    def _open(self, node: Node) -> Node:
        """The node with each of its parts cut by itself."""
        if isinstance(node, Chars) or node == EMPTY:
            return self._cut_node(node)
        if isinstance(node, Ref):
            return Ref(f"~{node.name}")
        children = tuple(map(self._cut_node, node.children))
        if isinstance(node, Repeat):
            return Repeat((children[0],), node.least, node.most)
        return Group(children, node.is_choice)

    def _is_nullable(self, node: Node) -> bool:
        """Of a regular node."""
        if isinstance(node, Chars):
            return False
        if isinstance(node, Ref):
            if node.name not in self._nullable_rules:
                self._nullable_rules[node.name] = self._is_nullable(self._rules[node.name])
            return self._nullable_rules[node.name]
        if isinstance(node, Repeat):
            return node.least == 0 or self._is_nullable(node.children[0])
        return (any if node.is_choice else all)(map(self._is_nullable, node.children))

    def _write_rule(self, node: Node) -> str:
        if isinstance(node, Ref):
            if node.name.startswith("#"):
                return f"L{self._places[int(node.name[1:])]}"
            return self._rule_name(node.name)
        return node.to_lark(self._write_rule)

    def _write_terminal(self, node: Node) -> str:
        return f"T{self._numbers[node.name]}" if isinstance(node, Ref) else node.to_lark(self._write_terminal)

    def _rule_name(self, name: str) -> str:
        return f"{'s' if name.startswith('~') else 'r'}{self._numbers[name.removeprefix('~')]}"

    def _neighbours(self) -> tuple[frozenset[int], dict[int, set[int]]]:
        """The places of lexemes that may begin a text, and those that may follow each place."""
        shapes = dict.fromkeys(self._cut, _Shape(False, frozenset(), frozenset()))
        followers: dict[int, set[int]] = {place: set() for place in range(len(self._places))}
        changed = True
        while changed:
            changed = False
            for name, node in self._cut.items():
                shape = self._shape(node, shapes, followers)
                changed |= shape != shapes[name]
                shapes[name] = shape
        return shapes["root"].first, followers

    def _shape(self, node: Node, shapes: Mapping[str, _Shape], followers: dict[int, set[int]]) -> _Shape:
        if isinstance(node, Ref):
            if not node.name.startswith("#"):
                return shapes[node.name]
            lexeme = frozenset((int(node.name[1:]),))
            return _Shape(False, lexeme, lexeme)
        if isinstance(node, Chars):
            raise TypeError(f"{node!r} is in no lexeme")
        parts = [self._shape(child, shapes, followers) for child in node.children]
        if isinstance(node, Repeat):
            for index in parts[0].last if node.most != 1 else ():
                followers[index] |= parts[0].first
            return parts[0]._replace(nullable=parts[0].nullable or node.least == 0)
        if node.is_choice:
            firsts, lasts = (part.first for part in parts), (part.last for part in parts)
            return _Shape(any(part.nullable for part in parts), frozenset().union(*firsts), frozenset().union(*lasts))
        whole = _Shape(True, frozenset(), frozenset())
        for part in parts:
            for index in whole.last:
                followers[index] |= part.first
            whole = _Shape(
                whole.nullable and part.nullable,
                whole.first | part.first if whole.nullable else whole.first,
                whole.last | part.last if part.nullable else part.last,
            )
        return whole

    def _share_text(self, a: int, b: int) -> bool:
        if a != b and (a, b) not in self._share_text_memo:
            self._share_text_memo[a, b] = self._walk_together(a, b, None)
        return a == b or self._share_text_memo[a, b]

    def _walk_together(self, lexeme_a: int, lexeme_b: int, after: AbstractSet[int] | None) -> bool:
        """Whether a text that completes `a` can be the beginning of a longer `b`, by one of the bytes `after`.

        Without `after`: whether some text completes both. True as well where finding out would take too long.
        """
        a, b = self._automaton(lexeme_a), self._automaton(lexeme_b)
        starts = (a.closure([0]), b.closure([0]))
        seen = {starts}
        waiting = [starts]
        while waiting:
            self._steps_left -= 1
            if self._steps_left <= 0:
                return True
            in_a, in_b = waiting.pop()
            bounds = sorted(
                {
                    point
                    for automaton, states in ((a, in_a), (b, in_b))
                    for state in states
                    for chars, _ in automaton.moves[state]
                    for first, last in chars.ranges
                    for point in (first, last + 1)
                }
            )
            for point in bounds:
                pair = (a.after(in_a, point), b.after(in_b, point))
                if not all(pair) or pair in seen:
                    continue
                if a.end in pair[0]:
                    found = b.end in pair[1] if after is None else not after.isdisjoint(b.lead_bytes(pair[1]))
                    if found:
                        return True
                seen.add(pair)
                waiting.append(pair)
        return False

    def _number(self, node: Node) -> int:
        number = self._lexeme_numbers.get(node)
        if number is None:
            number = self._lexeme_numbers[node] = len(self._lexemes)
            self._lexemes.append(node)
            automaton = _Automaton()
            try:
                automaton.end = self._extend(automaton, node, automaton.add())
                self._automata.append(automaton)
            except _TooLargeError:
                self._automata.append(None)
        return number

    def _automaton(self, lexeme: int) -> _Automaton:
        automaton = self._automata[lexeme]
        if automaton is None:
            raise _TooLargeError(f"lexeme {lexeme} should have been split")
        return automaton

    def _extend(self, automaton: _Automaton, node: Node, start: int) -> int:
        """Adds a node's automaton behind the state `start`; returns the state it ends in."""
        automaton.count_step()
        if isinstance(node, Ref):
            return self._extend(automaton, self._rules[node.name], start)
        if isinstance(node, Chars):
            end = automaton.add()
            automaton.moves[start].append((node, end))
            return end
        if isinstance(node, Repeat):
            for _ in range(node.least):
                start = self._extend(automaton, node.children[0], start)
            if node.most is None:
                again = automaton.add()
                automaton.jumps[start].append(again)
                automaton.jumps[self._extend(automaton, node.children[0], again)].append(again)
                return again
            end = automaton.add()
            for _ in range(node.most - node.least):
                automaton.jumps[start].append(end)
                start = self._extend(automaton, node.children[0], start)
            automaton.jumps[start].append(end)
            return end
        if not node.is_choice:
            for child in node.children:
                start = self._extend(automaton, child, start)
            return start
        end = automaton.add()
        for child in node.children:
            # A state of its own, or a loop at the end of one choice would lead into the others.
            begin = automaton.add()
            automaton.jumps[start].append(begin)
            automaton.jumps[self._extend(automaton, child, begin)].append(end)
        return end


def _split_rules(node: Node) -> list[str]:
    if isinstance(node, Ref):
        return [node.name] if node.name.startswith("~") else []
    return [] if isinstance(node, Chars) else [name for child in node.children for name in _split_rules(child)]
