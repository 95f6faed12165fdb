"""StopStrings: ends a stream of text at given strings, and holds back what may still become one of them."""

from __future__ import annotations


class StopStrings:
    """Text in, text out up to the first stop string, and with `include` the string itself.

    Otherwise the string never comes out, not even a part of it.
    """

    def __init__(self, strings: tuple[str, ...], include: bool = False) -> None:
        self._strings = strings
        self._include = include
        self._held = ""
        self.found_string: str | None = None

    @property
    def found(self) -> bool:
        return self.found_string is not None

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string. Nothing more comes once one is found."""
        if not self._strings:
            return text
        if self.found:
            return ""
        text = self._held + text
        places = [(place, string) for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            place, self.found_string = min(places)
            self._held = ""
            return text[: place + len(self.found_string) * self._include]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def skip(self, text: str) -> str:
        """Lets text through as it is: nothing in it may end the stream."""
        return self.flush() + text

    def flush(self) -> str:
        """What was held back and is no stop string, since no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that `string` begins with, short of the whole of it."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
