"""StopStrings against the obvious: cut the whole text at the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from puna.engine.stop_strings import StopStrings

# Two letters, so that overlaps are common.
TEXTS = st.text(alphabet="ab", max_size=12)


@given(pieces=st.lists(TEXTS, max_size=8), strings=st.lists(TEXTS.filter(bool), max_size=3))
def test_streamed_text_is_the_text_before_the_first_stop_string(pieces: list[str], strings: list[str]) -> None:
    stops = StopStrings(tuple(strings))
    streamed = ""
    pushed = ""
    for piece in pieces:
        streamed += stops.push(piece)
        pushed += piece
        places = [pushed.index(string) for string in strings if string in pushed]
        assert stops.found == bool(places)
        if stops.found:
            assert stops.push("more") == ""
            break
        assert pushed.startswith(streamed)
        held = pushed[len(streamed) :]
        # Nothing is held back but what may become a stop string.
        assert held == "" or any(string.startswith(held) for string in strings)
    streamed += stops.flush()
    assert streamed == (pushed[: min(places)] if strings and pieces and places else pushed)
