"""IsolatedTemplate: the same text as ChatTemplate's, and no more memory or time than it may have, whatever it does."""

from __future__ import annotations

from typing import Any

import pytest

from puna.engine.chat_template import ChatTemplate
from puna.engine.isolated_template import IsolatedTemplate

CHAT = [{"role": "user", "content": "Grüße, 日本 \U0001f999 \ud800"}, {"role": "assistant", "content": "ok"}]
SOURCE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ x }}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [{"name": "é"}]},
        {"template_variables": {"x": [1, 2.5, None, "y"]}},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
)
def test_the_text_is_the_same(options: dict[str, Any]) -> None:
    tokens = {"bos_token": "<s>"}
    expected = ChatTemplate({"default": SOURCE}, tokens).render(CHAT, **options)
    template = IsolatedTemplate(SOURCE, tokens)
    assert template.render(CHAT, **options) == expected
    assert template.mentions("add_generation_prompt")
    assert not template.mentions("enable_thinking")


# Gigabytes, each of its own way: in operators, in one call of a filter or method, in what is computed while it is
# compiled, in lists of texts that are all kept, and in what a joined text would be.
HUGE = (
    "{{ 'x' * 10**9 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = [n.s, n.s] | join %}{% endfor %}",
    "{% set n = namespace(s=[0]) %}{% for i in range(60) %}{% set n.s = (n.s, n.s) | sum(start=[]) %}{% endfor %}",
    "{{ (['x' * 10**7] * 1000) | join | length }}",
    "{{ 'x' | center(10**10) | length }}",
    "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) | length }}",
    "{{ ('a\n' * 10**6) | indent(10**6) | length }}",
    "{{ 'a\\tb'.expandtabs(10**10) | length }}",
    "{{ '%*d' | format(10**10, 1) | length }}",
    "{{ '{:10000000000}'.format(1) | length }}",
    "{{ 'x'.rjust(10**10) | length }}",
    "{{ (1).to_bytes(10**10, 'big') | length }}",
    "{{ ([1] | batch(10**10, 0) | list)[0] | length }}",
    "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = n.l + ['x' * 10**7 ~ i] %}{% endfor %}",
)


@pytest.mark.parametrize("source", HUGE)
def test_what_would_be_huge_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="the chat template"):
        IsolatedTemplate(source, {}).render(CHAT)


def test_where_the_limit_of_memory_is() -> None:
    assert IsolatedTemplate("{{ 'x' | center(64 * 2**20) | length }}", {}).render(CHAT) == str(64 * 2**20)
    with pytest.raises(ValueError, match="more than 256 MiB of memory"):
        IsolatedTemplate("{{ 'x' | center(256 * 2**20) | length }}", {}).render(CHAT)


def test_one_call_that_would_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loop that could look at the time: powers of a number of a million digits."""
    monkeypatch.setattr("puna.engine.isolated_template._PATIENCE", 0.5)
    with pytest.raises(ValueError, match=r"the chat template takes more than 0\.5 seconds"):
        IsolatedTemplate("{{ ((10 ** 999) ** 999) ** 999 }}", {}).render(CHAT)


def test_what_the_template_says_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="the chat template refuses the conversation: nö"):
        IsolatedTemplate("{{ raise_exception('nö') }}", {}).render(CHAT)
    with pytest.raises(ValueError, match="sandbox"):
        IsolatedTemplate("{{ ''.__class__.__mro__ }}", {}).render(CHAT)
    with pytest.raises(ValueError, match="does not compile: line 1: No filter named 'none'"):
        IsolatedTemplate("{{ x | none }}", {}).render(CHAT)


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{{ " + "(" * 30_000 + "1"])
def test_what_is_no_template_is_told_at_once(source: str) -> None:
    with pytest.raises(ValueError, match="does not compile"):
        IsolatedTemplate(source, {})


def test_nothing_of_the_environment_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What escapes from the sandbox finds no keys. The child is this very test's, as nothing is known to escape."""
    monkeypatch.setenv("PUNA_API_KEY", "secret")
    code = "import sys, os; sys.stdout.write('+' + str('PUNA_API_KEY' in os.environ)) #{path!r}"
    monkeypatch.setattr("puna.engine.isolated_template._CODE", code)
    assert IsolatedTemplate("", {}).render(CHAT) == "False"
