"""Reasoning: split from the rest wherever the text is cut, and through OpenAI's client with tools, guides and stops."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.chat_template import ChatTemplate
from puna.engine.engine import Engine
from puna.serving.message import MessageWriter, joined
from puna.serving.protocol import ChatRequest
from puna.serving.reasoning import Reasoning, ReasoningSplitter
from puna.serving.state import ServerSettings, ServerState
from puna.serving.tools import parser_for
from serving.conftest import Running, listening
from serving.test_tools import TIME, with_template

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
# Qwen3's way: the model opens the block itself, unless the prompt has closed it; DeepSeek's: the prompt opens it.
HYBRID = (
    "{% for t in tools or [] %}{{ t | tojson }}<tool_call>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPEN = HYBRID.replace("{% if enable", "{% if opens is not defined %}<think>\n{% endif %}{% if enable")
MAYBE, OPENED = Reasoning("<think>", "</think>", False), Reasoning("<think>", "</think>", True)

# marks, text, reasoning, the rest
TEXTS: tuple[tuple[Reasoning, str, str, str], ...] = (
    (MAYBE, "<think>\nhm  hm\n</think>\n\nyes", "hm  hm", "yes"),
    (MAYBE, "\n<think>hm</think>yes </think> <think>", "hm", "yes </think> <think>"),
    (MAYBE, "  plain <think>x</think>", "", "  plain <think>x</think>"),
    (MAYBE, "<thin", "", "<thin"),
    (MAYBE, "<think>cut o", "cut o", ""),
    (MAYBE, "<think>a </th", "a </th", ""),
    (MAYBE, "<think></think>", "", ""),
    (MAYBE, "<think> \n </think> \n ", "", ""),
    (MAYBE, "", "", ""),
    (OPENED, "hm</think>\n\nyes\n", "hm", "yes\n"),
    (OPENED, "<think>\nhm</think>yes", "hm", "yes"),
    (OPENED, "hm < a </thinking> b</think>c", "hm < a </thinking> b", "c"),
    (OPENED, "never over ", "never over", ""),
    (OPENED, "</think>yes", "", "yes"),
    (Reasoning("[THINK]", "[/THINK]", False), "[THINK]é[/THINK]<think>", "é", "<think>"),
)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@settings(deadline=None)
@given(st.sampled_from(TEXTS), st.lists(st.integers(0, 1000), max_size=12))
def test_the_split_does_not_depend_on_cuts(case: tuple[Reasoning, str, str, str], places: list[int]) -> None:
    marks, text, reasoning, rest = case
    splitter = ReasoningSplitter(marks)
    told = [*(splitter.push(piece) for piece in cut(text, places)), splitter.flush()]
    assert "".join(part for part, _ in told) == reasoning
    assert "".join(part for _, part in told) == rest


@settings(deadline=None)
@given(
    st.sampled_from([MAYBE, OPENED]),
    st.lists(st.sampled_from(["<think>", "</think>", "<", "th", " ", "\n", "x", "</"])).map("".join),
    st.lists(st.integers(0, 1000), max_size=12),
)
def test_any_text_is_split_the_same_whole_and_cut(marks: Reasoning, text: str, places: list[int]) -> None:
    whole, pieces = ReasoningSplitter(marks), ReasoningSplitter(marks)
    expected = [whole.push(text), whole.flush()]
    told = [*(pieces.push(piece) for piece in cut(text, places)), pieces.flush()]
    for part in (0, 1):
        assert "".join(one[part] for one in told) == "".join(one[part] for one in expected)
    # Nothing but marks and white space is lost.
    letters = text.replace("<think>", "").replace("</think>", "")
    assert sum(map(len, ("".join(one) for one in told))) >= sum(not c.isspace() for c in letters)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=20), st.booleans())
def test_calls_behind_reasoning(places: list[int], shows: bool) -> None:
    text = '<think>I <tool_call>{"name": "time"</think>\n\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    request = ChatRequest.model_validate({"model": "m", "messages": MESSAGES, "tools": [TIME]})
    parser = parser_for(request, request.tools or [], "hermes")
    writer = MessageWriter(parser, dialect="hermes", reasoning=MAYBE, shows_reasoning=shows)
    deltas = [delta for piece in cut(text, places) for delta in writer.push(piece, None)] + writer.push("", "stop")
    message = writer.message(deltas)
    assert message.get("reasoning") == message.get("reasoning_content")
    assert message.get("reasoning") == ('I <tool_call>{"name": "time"' if shows else None)
    assert message["content"] is None or not shows
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "time", "arguments": "{}"}]


def test_templates_tell_what_they_mark() -> None:
    def of(source: str, prompt: str, continued: str | None = None) -> Reasoning | None:
        return Reasoning.of(ChatTemplate({"default": source}, {}), prompt, continued)

    assert of("plain", "x<think>") is None
    assert of(HYBRID, "[user]hi[a]") == MAYBE
    assert of(HYBRID, "[user]<think>[a]") == MAYBE  # a user's words open nothing
    assert of(HYBRID, "[user]hi[a]<think>\n") == OPENED
    assert of(HYBRID, "[user]hi[a]<think>\n\n</think>\n\n") is None
    assert of(HYBRID, "[user]hi[assistant]<think>so", "<think>so") == OPENED
    assert of(HYBRID, "[user]hi[assistant]yes", "yes") is None
    assert of("[/THINK]", "x") == Reasoning("[THINK]", "[/THINK]", False)


@pytest.fixture(scope="module")
def thinkers(make_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    """Servers of the two ways, and one that was told not to split."""
    folder: Path = make_folder(max_position_embeddings=2048)
    engines, found, contexts = [], {}, []
    for name, template, options in (
        ("hybrid", HYBRID, {}),
        ("open", OPEN, {}),
        ("off", HYBRID, {"splits_reasoning": False}),
    ):
        model = with_template(folder, template, tmp_path_factory.mktemp(name) / "model")
        engines.append(Engine.from_pretrained(str(model)))
        settings = ServerSettings(model_name="small", trusts_request_template=name == "open", **options)
        contexts.append(listening(ServerState(settings, engines[-1], "ready")))
        found[name] = contexts[-1].__enter__()
    yield found
    for context in contexts:
        context.__exit__(None, None, None)
    for engine in engines:
        engine.shutdown()


def ask(running: Running, stream: bool, **fields: Any) -> dict[str, Any]:
    """The one choice, joined where it was streamed, and the usage."""
    body = {"model": "small", "messages": MESSAGES, "seed": 1, "max_tokens": 150, **fields}
    if not stream:
        answer = running.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        return choice | {"usage": answer.json()["usage"]}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = running.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    message = joined([choice["delta"] for choice in choices])
    return choices[-1] | {"message": message, "usage": chunks[-1]["usage"]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_guide_holds_behind_reasoning(thinkers: dict[str, Running], stream: bool) -> None:
    for name in ("hybrid", "open"):
        # Letters of the mark alone: a random model finds its way out sooner.
        found = ask(thinkers[name], stream, guided_regex="ok|no", max_tokens=1500, temperature=0.7)
        message, usage = found["message"], found["usage"]
        if found["finish_reason"] == "length":  # a random model may think without end
            assert message["content"] is None
            assert message["reasoning"]
            assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] == 1500
        else:
            assert message["content"] in ("ok", "no")
            assert usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    for off in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        found = ask(thinkers["hybrid"], stream, guided_regex="ok|no", **off)
        assert found["message"]["content"] in ("ok", "no")
        assert found["message"].get("reasoning") is None
        assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """guided_choice is the whole text, its reasoning as well: a random model writes no marks of its own."""
    monkeypatch.setattr(Reasoning, "marks", lambda self, tokenizer: None)


HM_OK = "<think>\nhm\n</think>\n\nok"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("scripted")
def test_reasoning_has_a_field_of_its_own(thinkers: dict[str, Running], stream: bool) -> None:
    for name, text in (("hybrid", HM_OK), ("open", HM_OK.removeprefix("<think>\n"))):
        found = ask(thinkers[name], stream, guided_choice=[text])
        assert found["message"]["content"] == "ok"
        assert found["message"]["reasoning"] == found["message"]["reasoning_content"] == "hm"
        assert found["finish_reason"] == "stop"
        # A token for each letter, and one for the end.
        assert found["usage"]["completion_tokens"] == len(text) + 1
        assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == text.index("</think>") + 8
        hidden = ask(thinkers[name], stream, guided_choice=[text], include_reasoning=False)
        assert hidden["message"]["content"] == "ok"
        assert "reasoning" not in hidden["message"]
        assert hidden["usage"] == found["usage"] | {"prompt_tokens_details": hidden["usage"]["prompt_tokens_details"]}
    found = ask(thinkers["off"], stream, guided_choice=[HM_OK])
    assert found["message"]["content"] == HM_OK
    assert "reasoning" not in found["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("scripted")
def test_cut_off_in_the_middle(thinkers: dict[str, Running], stream: bool) -> None:
    cut_off = ask(thinkers["hybrid"], stream, guided_choice=[HM_OK], max_tokens=9)
    assert (cut_off["message"]["content"], cut_off["message"]["reasoning"]) == (None, "h")
    assert cut_off["finish_reason"] == "length"
    stopped = ask(thinkers["hybrid"], stream, guided_choice=[HM_OK], stop=["m\n"])
    assert (stopped["message"]["content"], stopped["message"]["reasoning"]) == (None, "h")
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", "m\n")
    in_content = ask(thinkers["hybrid"], stream, guided_choice=[HM_OK], stop=["ok"])
    assert (in_content["message"]["content"], in_content["message"]["reasoning"]) == (None, "hm")


@pytest.mark.parametrize("shows", [False, True])
def test_no_content_yet_is_null(shows: bool) -> None:
    marks = Reasoning("<think>", "</think>", False)
    for text, content in (("<think>h", None), ("<think>h</think>", None), ("<think>h</think>x", "x"), ("", "")):
        writer = MessageWriter(reasoning=marks, shows_reasoning=shows)
        assert writer.message(writer.push(text, "length"))["content"] == content, text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("scripted")
def test_a_call_behind_reasoning(thinkers: dict[str, Running], stream: bool) -> None:
    text = '<think>hm</think>\n\n<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    found = ask(thinkers["hybrid"], stream, guided_choice=[text], tools=[TIME])
    assert [call["function"]["name"] for call in found["message"]["tool_calls"]] == ["time"]
    assert (found["message"]["content"], found["message"]["reasoning"]) == (None, "hm")
    assert found["finish_reason"] == "tool_calls"


def test_a_forced_call_behind_reasoning(thinkers: dict[str, Running]) -> None:
    named = {"type": "function", "function": {"name": "time"}}
    for choice in ("required", named):
        fields = {"tools": [TIME], "tool_choice": choice, "chat_template_kwargs": {"enable_thinking": False}}
        (call,) = ask(thinkers["hybrid"], True, parallel_tool_calls=False, **fields)["message"]["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("time", {})


def test_past_reasoning_goes_back_to_the_template(thinkers: dict[str, Running]) -> None:
    for name in ("reasoning", "reasoning_content"):
        messages = [*MESSAGES, {"role": "assistant", "content": "ok", name: "hm"}, *MESSAGES]
        answer = thinkers["hybrid"].http.post("/tokenize", json={"messages": messages}).json()
        text = thinkers["hybrid"].http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
        assert text == "[user]hi[assistant]<think>hm</think>ok[user]hi[a]"


def test_requests_bring_templates_only_where_they_are_trusted(thinkers: dict[str, Running]) -> None:
    own = {"chat_template": "{{ messages[0].content }}!", "guided_choice": ["ok"]}
    assert ask(thinkers["open"], False, **own)["usage"]["prompt_tokens"] == len("hi!")
    for name, fields, expected in (
        ("hybrid", own, "--trust-request-chat-template"),
        ("open", {"chat_template": "{% if %}"}, "does not compile"),
        ("open", {"chat_template": "{{ ''.__class__.__mro__ }}"}, "sandbox"),
        ("open", {"chat_template": "x" * 70_000}, "chat_template"),
        ("open", {"reasoning_effort": "low"}, "reasoning_effort"),
    ):
        body = {"model": "small", "messages": MESSAGES, **fields}
        answer = thinkers[name].http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert expected in answer.text
        assert answer.json()["error"]["param"] == next(iter(fields))
