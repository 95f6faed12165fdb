"""The chat page in Chromium, on a server with the demo model: everything that a person does with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import puna
from clients.browser import ChatPage, OpenPage, chromium, open_page, playwright  # noqa: F401
from puna.engine.engine import Engine
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import Running, listening

DEMO = Path(puna.__file__).parent / "demo"
START = "Once upon a time, a fox"
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def demo() -> Iterator[Running]:
    engine = Engine.from_pretrained(str(DEMO))
    with listening(ServerState(ServerSettings(model_name="demo"), engine, "ready")) as running:
        yield running
    engine.shutdown()


@pytest.fixture
def page(demo: Running, open_page: OpenPage) -> Iterator[ChatPage]:  # noqa: F811
    with open_page(demo.url) as chat:
        chat.wait_until_ready()
        yield chat
    demo.wait_until_idle()


@pytest.fixture
def slow(demo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token every 50 milliseconds, so that there is time to do something meanwhile."""
    assert demo.state.engine is not None
    submit = demo.state.engine.parts.executor.submit

    def slowly(plan: Any) -> Any:
        time.sleep(0.05)
        return submit(plan)

    monkeypatch.setattr(demo.state.engine.parts.executor, "submit", slowly)


def set_sampling(chat: ChatPage, **values: Any) -> None:
    """As a person does, in the settings; greedy and short unless told otherwise."""
    names = {"temperature": "Temperature", "max_tokens": "Most tokens", "seed": "Seed", "top_p": "Top p"}
    chat.button("Settings").click()
    for name, value in ({"temperature": 0, "max_tokens": 12} | values).items():
        chat.page.get_by_label(names[name], exact=True).fill(str(value))
    chat.button("Done").click()


# Talking -------------------------------------------------------------------------------------------------------------


def test_answer_is_the_api_s(page: ChatPage, demo: Running) -> None:
    set_sampling(page, max_tokens=60)
    page.ask(START)
    messages: Any = [{"role": "user", "content": START}]
    oracle = demo.client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=60)
    assert page.contents() == [START, oracle.choices[0].message.content]
    shown = page.answers.locator(".content:not(.reasoning *)").inner_text()
    assert shown.split() == (oracle.choices[0].message.content or "").split()
    assert oracle.usage is not None
    stats = page.answers.locator(".stats").inner_text()
    found = re.fullmatch(r"(\d+) tokens · ([\d.]+) tokens/s · first after ([\d.]+) s", stats)
    assert found is not None, stats
    assert int(found[1]) == oracle.usage.completion_tokens
    assert page.answers.locator(".note").inner_text() == "Cut off at the limit of tokens."
    assert page.page.title() == f"{START} · puna"


def test_text_appears_while_it_is_written(page: ChatPage, slow: None) -> None:
    set_sampling(page, max_tokens=40)
    page.send(START)
    lengths: list[int] = []
    content = page.answers.locator(".content:not(.reasoning *)")
    while page.button("Stop").is_visible() or not lengths:
        lengths.append(len(content.inner_text()))
        page.page.wait_for_timeout(50)
    assert len(set(lengths)) > 5
    assert lengths == sorted(lengths)


def test_page_tells_that_it_waits(page: ChatPage) -> None:
    page.page.route("**/v1/chat/completions", lambda route: None)  # no answer, as of a long prompt
    page.send(START)
    playwright.expect(page.answers.get_by_text("Waiting for the first token")).to_be_visible()
    playwright.expect(page.answers.get_by_role("button")).to_have_count(0)
    page.button("Stop").click()
    page.wait_until_answered()
    playwright.expect(page.answers.get_by_text("Waiting for the first token")).to_be_hidden()
    assert page.answers.locator(".note").inner_text() == "Stopped."


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_there_is_and_ends_the_request(page: ChatPage, demo: Running, slow: None, how: str) -> None:
    set_sampling(page, max_tokens=400)
    page.send(START)
    playwright.expect(page.answers.locator(".stats")).to_contain_text(re.compile(r"\d tokens"))
    page.button("Stop").click() if how == "button" else page.page.keyboard.press("Escape")
    page.wait_until_answered()
    demo.wait_until_idle()
    assert page.answers.locator(".note").inner_text() == "Stopped."
    (message,) = page.stored()[0]["messages"][1:]
    assert 1 <= message["stats"]["tokens"] < 400
    assert message["content"]
    playwright.expect(page.box).to_be_focused()
    set_sampling(page)
    page.ask("And then")
    assert len(page.contents()) == 4


def test_answer_again(page: ChatPage) -> None:
    set_sampling(page, temperature=1, seed=3)
    page.ask(START)
    first = page.contents()
    page.button("Answer again").click()
    page.wait_until_answered()
    assert page.contents() == first  # the seed's
    set_sampling(page, temperature=1, seed=4)
    page.button("Answer again").click()
    page.wait_until_answered()
    second = page.contents()
    assert len(second) == 2
    assert second != first
    assert page.answers.count() == 1


def test_edit_and_send_again(page: ChatPage) -> None:
    set_sampling(page)
    page.ask(START)
    page.ask("A second message")
    before = page.contents()
    page.button("Edit and send again").first.click()
    field = page.page.get_by_role("textbox", name="Your message")
    playwright.expect(field).to_be_focused()
    playwright.expect(field).to_have_value(START)
    field.press("Escape")
    assert page.contents() == before
    page.button("Edit and send again").first.click()
    field.fill("The old king")
    field.press("Enter")
    page.wait_until_answered()
    contents = page.contents()
    assert contents[0] == "The old king"
    assert len(contents) == 2
    playwright.expect(page.box).to_be_focused()
    assert page.stored()[0]["title"] == "The old king"
    page.button("Undo").click()
    assert page.contents() == before
    playwright.expect(page.answers).to_have_count(2)


def test_delete_message_and_undo(page: ChatPage) -> None:
    page.stub_stream({"content": "An answer"})
    page.ask("one")
    page.ask("two")
    page.button("Delete").first.click()
    assert page.contents() == ["two", "An answer"]  # a question goes with its answer
    page.button("Undo").click()
    assert page.contents() == ["one", "An answer", "two", "An answer"]
    page.button("Delete").last.click()
    assert page.contents() == ["one", "An answer", "two"]


def test_copy(page: ChatPage, demo: Running) -> None:
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=demo.url)
    page.stub_stream({"content": "**a** \n```py\nx = 1\n```"})
    page.ask("go")
    page.button("Copy").nth(1).click()  # the code's
    playwright.expect(page.page.locator("#toast")).to_have_text("Copied.")
    assert page.page.evaluate("navigator.clipboard.readText()") == "x = 1"
    page.answers.locator("footer").get_by_role("button", name="Copy").click()
    page.page.wait_for_function("async () => (await navigator.clipboard.readText()).startsWith('**a**')")


def test_request_has_what_was_set_and_nothing_else(page: ChatPage) -> None:
    asked = page.stub_stream({"content": "yes"})
    page.ask("one")
    assert asked[0] == {
        "model": "demo",
        "messages": [{"role": "user", "content": "one"}],
        "stream": True,
        "return_token_ids": True,
    }
    page.button("Settings").click()
    form = page.page.locator("#settings")
    for name, value in (("Temperature", "0.5"), ("Top p", "0.9"), ("Top k", "40"), ("Min p", "0.05"), ("Seed", "7"),
                        ("Repetition penalty", "1.1"), ("Most tokens", "99")):  # fmt: skip
        form.get_by_label(name, exact=True).fill(value)
    form.get_by_label("System prompt").fill("Be brief.")
    form.get_by_label("Stop at").fill("END\n\\n\\n")
    page.button("Done").click()
    page.ask("two")
    assert asked[1] == {
        "model": "demo",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "two"},
        ],
        "stream": True,
        "return_token_ids": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 7,
        "repetition_penalty": 1.1,
        "max_tokens": 99,
        "stop": ["END", "\n\n"],
    }
    page.button("Settings").click()
    form.get_by_label("Temperature", exact=True).fill("3")  # out of bounds: kept from the server
    page.button("Done").click()
    playwright.expect(form).to_be_visible()
    page.button("As the model recommends").click()
    page.button("Done").click()
    page.page.reload()
    page.wait_until_ready()
    page.ask("three")
    assert set(asked[2]) == {"model", "messages", "stream", "return_token_ids"}


def test_reasoning_and_tool_calls_are_shown(page: ChatPage) -> None:
    call = {"index": 0, "id": "x", "type": "function", "function": {"name": "weather", "arguments": ""}}
    page.stub_stream(
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Let me *think*."},
        {"content": "It is "},
        {"content": "cold."},
        {"tool_calls": [call]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Puno"}'}}]},
    )
    page.ask("Weather?")
    reasoning = page.answers.locator("details")
    assert reasoning.get_attribute("open") is None
    reasoning.locator("summary").click()
    assert reasoning.locator(".content").inner_html() == "<p>Let me <em>think</em>.</p>"
    assert page.answers.locator(".content:not(.reasoning *)").inner_text() == "It is cold."
    assert page.answers.locator(".call p").inner_text() == "Calls weather"
    assert json.loads(page.answers.locator(".call pre").inner_text()) == {"city": "Puno"}
    page.ask("And tomorrow?")
    playwright.expect(reasoning.first).to_have_attribute("open", "")  # as the reader left it
    page.page.reload()
    assert page.answers.locator(".call p").first.inner_text() == "Calls weather"


def test_text_mode_of_a_model_without_a_chat_template(open_page: OpenPage, tmp_path: Path) -> None:  # noqa: F811
    folder = shutil.copytree(DEMO, tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    engine = Engine.from_pretrained(str(folder))
    state = ServerState(ServerSettings(model_name="base"), engine, "ready")
    with listening(state) as running, open_page(running.url) as chat:
        chat.wait_until_ready()
        playwright.expect(chat.page.locator("#explanation")).to_contain_text("no chat template")
        set_sampling(chat, max_tokens=10)
        chat.ask("Once upon")
        chat.ask("")  # goes on
        chat.ask(" The *end*")
        prompt = ""
        for text in ("Once upon", "", " The *end*"):
            prompt += text
            answer = running.client.completions.create(model="base", prompt=prompt, temperature=0, max_tokens=10)
            prompt += answer.choices[0].text
        assert "".join(chat.contents()) == prompt
        shown = [chat.page.get_by_role("article").nth(i).locator(".plain").inner_text() for i in range(5)]
        assert shown == chat.contents()  # as it stands
    engine.shutdown()


# Trouble -------------------------------------------------------------------------------------------------------------


# `puna serve` with a token every 50 milliseconds.
SLOW_SERVE = """
import sys, time
from puna.cli import main
from puna.runtime.model_runner import ModelRunner

execute = ModelRunner.execute
ModelRunner.execute = lambda *arguments: (time.sleep(0.05), execute(*arguments))[1]
sys.argv[0] = "puna"
main()
"""


@pytest.fixture
def process() -> Iterator[Any]:
    """Starts `puna serve`, slowed down, as a process of its own, on one port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        source = str(Path(puna.__file__).parent.parent)
        environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SLOW_SERVE, "serve", "--model", "demo", "--port", str(port)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return running[-1]
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    yield start, f"http://127.0.0.1:{port}"
    for one in running:
        one.kill()
        one.wait()


def test_server_that_dies_and_comes_back(open_page: OpenPage, process: Any) -> None:  # noqa: F811
    start, url = process
    server = start()
    with open_page(url) as chat:
        chat.wait_until_ready()
        chat.send(START)
        playwright.expect(chat.answers.locator(".stats")).to_contain_text("tokens")
        server.send_signal(signal.SIGKILL)
        error = chat.answers.locator(".error")
        playwright.expect(error).to_contain_text("The connection to the server broke off.")
        assert chat.answers.locator(".content:not(.reasoning *)").inner_text().strip()
        playwright.expect(chat.page.get_by_role("status").first).to_contain_text("can’t be reached")
        playwright.expect(chat.button("Send")).to_be_disabled()
        partial = chat.contents()[1]
        chat.box.fill("kept")
        chat.box.press("Enter")
        playwright.expect(chat.box).to_have_value("kept")
        start()
        chat.wait_until_ready()
        error.get_by_role("button", name="Try again").click()
        chat.wait_until_answered()
        playwright.expect(error).to_be_hidden()
        assert chat.contents()[1] != partial
        assert len(chat.contents()) == 2


def test_page_waits_while_the_model_loads(demo: Running, open_page: OpenPage) -> None:  # noqa: F811
    state = ServerState(ServerSettings(model_name="demo"), step="load weights")
    with listening(state) as running, open_page(running.url) as chat:
        status = chat.page.locator("#status")
        playwright.expect(status).to_have_text("The model is loading: load weights")
        playwright.expect(chat.button("Send")).to_be_disabled()
        state.step = "first token"
        playwright.expect(status).to_have_text("The model is loading: first token")
        assert demo.state.engine is not None
        state.become_ready(demo.state.engine)
        chat.wait_until_ready()
        playwright.expect(status).to_be_hidden()
        state.phase = "draining"
        chat.ask(START)
        playwright.expect(chat.answers.locator(".error")).to_contain_text("shutting down")
        playwright.expect(status).to_contain_text("shutting down")
        state.phase = "failed"
        playwright.expect(status).to_contain_text("engine stopped after an error")


def test_key(demo: Running, open_page: OpenPage) -> None:  # noqa: F811
    state = ServerState(ServerSettings(model_name="demo", api_keys=("secret",)), demo.state.engine, "ready")
    with listening(state) as running, open_page(running.url) as chat:
        dialog = chat.page.get_by_role("dialog", name="API key")
        field = dialog.get_by_label("Key", exact=True)
        playwright.expect(field).to_be_focused()
        field.press("Escape")
        playwright.expect(chat.page.locator("#status")).to_contain_text("needs an API key")
        chat.button("Enter the key").click()
        field.fill("wrong")
        field.press("Enter")
        playwright.expect(dialog).to_contain_text("the API key is wrong")
        field.fill("secret")
        field.press("Enter")
        chat.wait_until_ready()
        chat.ask(START)
        assert chat.contents()[1]
        # Kept for the tab, and nowhere else.
        chat.page.reload()
        chat.wait_until_ready()
        assert "secret" not in json.dumps(chat.page.evaluate("({ ...localStorage })"))
        # One that the server takes back is asked for again, and then the answer comes.
        object.__setattr__(state.settings, "api_keys", ("newer",))
        chat.send("And then")
        field.fill("newer")
        field.press("Enter")
        chat.wait_until_answered()
        assert len(chat.contents()) == 4
        assert "error" not in chat.stored()[0]["messages"][3]


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ('data: {"error": {"message": "the engine stopped"}}\n\ndata: [DONE]\n\n', "the engine stopped"),
        ("", "The answer ended before it was complete."),
        ("data: {nonsense\n\n", "The connection to the server broke off."),
    ],
)
def test_stream_that_fails(page: ChatPage, end: str, told: str) -> None:
    page.stub_stream({"content": "Half an answ"}, end=end)
    page.ask("go")
    assert page.answers.locator(".error p").inner_text() == told
    assert page.contents() == ["go", "Half an answ"]
    page.unstub()
    page.stub_stream({"content": "A whole answer"})
    page.button("Try again").click()
    page.wait_until_answered()
    assert page.contents() == ["go", "A whole answer"]


def test_errors_of_the_server_are_shown_as_it_told_them(page: ChatPage) -> None:
    page.stub_error(429, "500 requests wait <b>already</b>")
    page.ask("go")
    assert page.answers.locator(".error p").inner_text() == "500 requests wait <b>already</b>"
    page.unstub()
    # The demo model takes no system message, and the real server says so.
    page.button("Settings").click()
    page.page.get_by_label("System prompt").fill("Be brief.")
    page.button("Done").click()
    page.button("Try again").click()
    page.wait_until_answered()
    playwright.expect(page.answers.locator(".error")).to_contain_text("takes no system message")
    # An answer that failed is not sent as one.
    asked = page.stub_stream({"content": "ok"})
    page.ask("more")
    assert asked[0]["messages"][1:] == [{"role": "user", "content": "go\n\nmore"}]


# What stays ----------------------------------------------------------------------------------------------------------


def test_conversations_stay(page: ChatPage) -> None:
    set_sampling(page)
    page.ask("The first one")
    page.button("New conversation").click()
    page.ask("The second one")
    second = page.contents()
    page.page.reload()
    page.wait_until_ready()
    shown = page.page.get_by_role("article").locator(".content:not(.reasoning *)").all_inner_texts()
    assert [text.split() for text in shown] == [text.split() for text in second]
    items = page.page.get_by_role("navigation").get_by_role("listitem")
    assert items.all_inner_texts() == ["The second one", "The first one"]
    page.button("The first one").click()
    playwright.expect(page.page.get_by_role("article", name="You")).to_have_text("The first one")
    items.nth(1).hover()
    page.button("Delete The first one").click()
    assert items.all_inner_texts() == ["The second one"]
    playwright.expect(page.page.get_by_role("article")).to_have_count(0)
    page.button("Undo").click()
    assert len(page.stored()) == 2
    playwright.expect(page.page.get_by_role("article", name="You")).to_have_text("The first one")


@pytest.fixture
def tab(page: ChatPage, demo: Running) -> ChatPage:
    """A second tab, with the same storage."""
    other = ChatPage(page.page.context.new_page(), demo.url + "/")
    other.open()
    other.wait_until_ready()
    return other


def test_tabs_follow_each_other(page: ChatPage, tab: ChatPage) -> None:
    for one in (page, tab):
        one.stub_stream({"content": "An answer"})
    page.ask("one")
    tab.button("one").click()
    tab.ask("two")
    playwright.expect(page.answers).to_have_count(2)
    page.ask("three")
    playwright.expect(tab.answers).to_have_count(3)
    assert page.contents() == ["one", "An answer", "two", "An answer", "three", "An answer"]
    tab.page.get_by_role("article", name="You").last.hover()
    tab.button("Edit and send again").last.click()
    page.ask("four")  # while the other one edits
    tab.page.get_by_role("textbox", name="Your message").fill("instead")
    tab.page.get_by_role("textbox", name="Your message").press("Enter")
    tab.wait_until_answered()
    assert [len(found["messages"]) for found in page.stored()] == [6, 8]  # both
    assert tab.contents()[4] == "instead"
    tab.button("Settings").click()
    tab.page.get_by_label("Seed", exact=True).fill("5")
    tab.button("Done").click()
    tab.button("New conversation").click()
    page.button("New conversation").click()
    asked = page.stub_stream({"content": "Seeded"})
    page.ask("five")
    assert asked[0]["seed"] == 5
    tab.button("five").click()
    page.page.get_by_role("listitem").filter(has_text="five").hover()
    page.button("Delete five").click()
    playwright.expect(tab.page.get_by_role("article")).to_have_count(0)
    page.button("Undo").click()
    playwright.expect(tab.button("five")).to_be_visible()
    assert len(page.stored()) == 3
    assert tab.problems == []


def test_tabs_that_write_one_conversation_at_once_lose_nothing(page: ChatPage, tab: ChatPage, slow: None) -> None:
    set_sampling(page, max_tokens=4)
    page.ask("one")
    tab.button("one").click()
    set_sampling(page, max_tokens=40)
    page.send("two")
    playwright.expect(page.answers.nth(1).locator(".stats")).to_contain_text("tokens")
    tab.send("three")
    page.wait_until_answered()
    tab.wait_until_answered()
    kept = page.stored()
    assert {message["content"] for found in kept for message in found["messages"] if message["role"] == "user"} == {
        "one",
        "two",
        "three",
    }
    for text, chat in (("two", page), ("three", tab)):
        (found,) = (found for found in kept if found["messages"][-2]["content"] == text)
        assert found["messages"][-1]["stats"]["tokens"] == 40
        shown = chat.answers.last.locator(".content:not(.reasoning *)").inner_text()
        assert shown.split() == found["messages"][-1]["content"].split()
    assert tab.problems == []


def test_writes_that_cross_are_both_kept(page: ChatPage, tab: ChatPage) -> None:
    """Another tab's write that this one could not see in time: the browser tells of it after its own."""
    page.stub_stream({"content": "Mine"})
    page.ask("one")
    theirs = page.stored()[0] | {"messages": [{"role": "user", "content": "theirs"}]}
    tab.page.evaluate("(found) => localStorage.setItem(`puna.chat.${found.id}`, JSON.stringify(found))", theirs)
    playwright.expect(page.page.locator("#toast")).to_contain_text("both are kept")
    contents = [[message["content"] for message in found["messages"]] for found in page.stored()]
    assert sorted(contents) == [["one", "Mine"], ["theirs"]]
    page.ask("more")
    assert page.contents() == ["one", "Mine", "more", "Mine"]


def test_two_answers_at_once(page: ChatPage, slow: None) -> None:
    set_sampling(page, max_tokens=25)
    page.send("The first one")
    playwright.expect(page.answers.locator(".stats")).to_contain_text("tokens")
    page.button("New conversation").click()
    playwright.expect(page.button("Send")).to_be_visible()
    page.ask("The second one")
    page.button("The first one").click()
    page.wait_until_answered()
    for conversation in page.stored():
        assert conversation["messages"][1]["stats"]["tokens"] == 25


def test_reload_in_the_middle_keeps_the_text(page: ChatPage, demo: Running, slow: None) -> None:
    page.send(START)
    playwright.expect(page.answers.locator(".stats")).to_contain_text(re.compile(r"\d tokens"))
    page.page.reload()
    demo.wait_until_idle()  # the server noticed
    assert page.answers.locator(".content:not(.reasoning *)").inner_text().strip()


def test_export_and_import(page: ChatPage, open_page: OpenPage, demo: Running, tmp_path: Path) -> None:  # noqa: F811
    set_sampling(page)
    page.ask("To keep")
    with page.page.expect_download() as download:
        page.button("Export").click()
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    kept = page.stored()
    assert json.loads(file.read_text())["conversations"] == kept
    with open_page(demo.url) as other:
        for name, text in (("bad.json", "{"), ("other.json", '{"format": "x"}'), ("damaged.json", json.dumps(
            {"format": "puna-chat", "version": 1, "conversations": [kept[0] | {"messages": [{"role": "root"}]}]}
        ))):  # fmt: skip
            (tmp_path / name).write_text(text)
            other.page.locator("#file").set_input_files(tmp_path / name)
            playwright.expect(other.page.locator("#toast")).to_contain_text("file")
            assert other.stored() == []
        other.page.locator("#file").set_input_files(file)
        playwright.expect(other.page.locator("#toast")).to_have_text("1 conversation imported.")
        assert other.stored() == kept
        other.page.locator("#file").set_input_files(file)  # twice is once
        assert other.stored() == kept
        other.button("To keep").click()
        playwright.expect(other.answers).to_have_count(1)


def test_full_storage_is_told_and_loses_nothing(page: ChatPage) -> None:
    page.page.evaluate(
        """() => {
            for (let size = 4_000_000; size >= 1; size = Math.floor(size / 2)) {
                for (let i = 0; ; i++) {
                    try {
                        localStorage.setItem(`other.${size}.${i}`, "x".repeat(size));
                    } catch {
                        break;
                    }
                }
            }
        }"""
    )
    set_sampling(page)
    page.ask("No room for this")
    playwright.expect(page.page.locator("#status")).to_contain_text("no room for this conversation")
    assert page.answers.locator(".stats").inner_text()
    assert page.stored() == []
    with page.page.expect_download() as download:
        page.button("Export").click()
    exported = json.loads(Path(download.value.path()).read_text())["conversations"]
    assert [len(found["messages"]) for found in exported] == [2]
    page.page.evaluate(
        "Object.keys(localStorage).filter((k) => k.startsWith('other')).forEach((k) => localStorage.removeItem(k))"
    )
    page.button("Answer again").click()
    page.wait_until_answered()
    playwright.expect(page.page.locator("#status")).to_be_hidden()
    assert len(page.stored()) == 1


def test_damaged_storage_does_no_harm(demo: Running, page: ChatPage) -> None:
    page.page.evaluate(
        """() => {
            localStorage["puna.settings"] = "[]";
            localStorage["puna.chat.a"] = "{";
            localStorage["puna.chat.b"] = '{"id": "b", "messages": [{"role": "user", "content": 5}]}';
            localStorage["puna.chat.c"] = 'null';
            localStorage["puna.chat.d"] = JSON.stringify({ id: "d", title: "<img src=x onerror=hit=1>", messages: [
                { role: "assistant", content: "ok", calls: [null, 3], stats: { tokens: "x" }, error: {} }] });
        }"""
    )
    page.page.reload()
    page.wait_until_ready()
    page.button("<img src=x onerror=hit=1>").click()
    assert page.answers.locator(".content:not(.reasoning *)").inner_text() == "ok"
    page.stub_stream({"content": "fine"})
    page.ask("go")
    assert page.page.evaluate("window.hit") is None


# For everyone --------------------------------------------------------------------------------------------------------


def test_everything_by_keyboard(page: ChatPage) -> None:
    page.stub_stream({"content": "An answer with [a link](https://example.org) and\n```sh\nls\n```"})
    keyboard = page.page.keyboard

    def go_to(name: str, back: bool = False) -> None:
        for _ in range(60):
            found = page.page.evaluate(
                "() => document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || ''"
            )
            if found.strip() == name:
                ring = page.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
                assert ring == "solid" or name == "Message"  # whose box has one around it
                return
            keyboard.press("Shift+Tab" if back else "Tab")
        raise AssertionError(f"no way to {name} by keyboard")

    playwright.expect(page.box).to_be_focused()
    keyboard.type("first line")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    keyboard.press("Enter")
    page.wait_until_answered()
    assert page.contents()[0] == "first line\nsecond line"
    playwright.expect(page.box).to_be_focused()
    go_to("Answer again", back=True)
    keyboard.press("Enter")
    page.wait_until_answered()
    playwright.expect(page.box).to_be_focused()
    go_to("Edit and send again", back=True)
    keyboard.press("Enter")
    keyboard.press("End")
    keyboard.type("!")
    keyboard.press("Enter")
    page.wait_until_answered()
    assert page.contents()[0] == "first line\nsecond line!"
    go_to("Settings", back=True)
    keyboard.press("Enter")
    playwright.expect(page.page.get_by_role("dialog", name="Settings")).to_be_visible()
    go_to("Done")
    keyboard.press("Enter")
    assert page.page.evaluate("document.activeElement.id") == "open-settings"
    page.page.reload()
    page.wait_until_ready()
    page.page.evaluate("document.activeElement.blur()")
    go_to("Skip to the message box")
    keyboard.press("Enter")
    playwright.expect(page.box).to_be_focused()
    go_to("New conversation", back=True)
    keyboard.press("Enter")
    playwright.expect(page.box).to_be_focused()
    playwright.expect(page.page.get_by_role("article")).to_have_count(0)


def full_page(chat: ChatPage) -> None:
    """A conversation that shows everything there is."""
    wide = "word " * 30 + "x" * 300
    text = (
        f"# Heading\n\n{wide}\n\n1. a\n   - b\n\n> quote\n\n[link](https://example.org) `{'y' * 200}`\n\n---\n\n"
        f"```python\nif True:  # {wide}\n    print('z', 1)\n```\n\n"
        f"|{' head |' * 12}\n|{'---|' * 12}\n|{' cell |' * 12}\n"
    )
    call = {"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": "' + wide + '"}'}}
    chat.stub_stream({"reasoning_content": "Thinking."}, {"content": text}, {"tool_calls": [call]})
    chat.ask("q" * 200)
    chat.answers.locator("summary").click()
    chat.unstub()
    chat.stub_error(500, "e" * 200)
    chat.ask("and more")


@pytest.mark.parametrize("options", [{"viewport": {"width": 1280, "height": 800}}, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_window(demo: Running, open_page: OpenPage, options: Any) -> None:  # noqa: F811
    with open_page(demo.url, **options) as chat:
        chat.wait_until_ready()
        full_page(chat)
        width = options["viewport"]["width"]

        def check() -> None:
            found = chat.page.evaluate(
                """() => {
                    const inner = document.getElementById("scroll");
                    const outside = [...document.querySelectorAll("button, input, textarea, select, p, h1, h2")]
                        .filter((node) => !node.closest("pre, .table") && node.checkVisibility())
                        .filter((node) => !node.closest(".visually-hidden, .skip, #hint"))
                        .filter((node) => node.getBoundingClientRect().right > innerWidth + 0.5
                            || node.getBoundingClientRect().left < -0.5)
                        .map((node) => node.outerHTML.slice(0, 200));
                    return [document.documentElement.scrollWidth, inner.scrollWidth - inner.clientWidth, outside];
                }"""
            )
            assert found == [width, 0, []]

        check()
        chat.button("Settings").click()
        check()
        chat.page.keyboard.press("Escape")
        chat.button("Conversations").click()
        check()


def test_sidebar_of_a_phone(demo: Running, open_page: OpenPage) -> None:  # noqa: F811
    with open_page(demo.url, **PHONE) as chat:
        chat.wait_until_ready()
        assert chat.page.evaluate("document.activeElement.id") == ""  # no keyboard over half of the screen
        navigation = chat.page.get_by_role("navigation")
        playwright.expect(navigation).to_be_hidden()
        chat.button("Conversations").click()
        playwright.expect(navigation).to_be_visible()
        playwright.expect(chat.button("New conversation")).to_be_focused()
        assert chat.page.evaluate("document.getElementById('page').inert") is True
        chat.page.keyboard.press("Escape")
        playwright.expect(navigation).to_be_hidden()
        playwright.expect(chat.button("Conversations")).to_be_focused()
        # Big enough for fingers.
        for button in chat.page.get_by_role("button").all():
            size = button.bounding_box()
            assert min(size["width"], size["height"]) >= 44, button.get_attribute("aria-label")


# Of every element that has text of its own: its colour over its ground, by WCAG's formula.
CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const light = (colour) => {
        const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = colour.map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratio = (a, b) => {
        const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
    };
    const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const colour = rgba(getComputedStyle(at).backgroundColor);
            if (colour[3] === 1) return colour;
            if (colour[3] !== 0) throw new Error(`half a background: ${at.outerHTML.slice(0, 100)}`);
        }
        return rgba("Canvas");
    };
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
        const isText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!node.checkVisibility() || node.disabled || node.closest("noscript, .visually-hidden")) continue;
        if (isText || node.placeholder) {
            const style = getComputedStyle(node, node.placeholder ? "::placeholder" : null);
            found.push([ratio(rgba(style.color), ground(node)), 4.5, node.outerHTML.slice(0, 120)]);
        }
        if (node.matches("button svg")) {
            const colour = rgba(getComputedStyle(node).stroke);
            found.push([ratio(colour, ground(node)), 3, node.parentElement.outerHTML.slice(0, 120)]);
        }
        if (node.matches("dialog input, dialog textarea, dialog select, #composer")) {
            found.push([ratio(rgba(getComputedStyle(node).borderTopColor), ground(node.parentElement)), 3, node.id]);
        }
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("by", ["system", "toggle"])
def test_contrast(demo: Running, open_page: OpenPage, scheme: str, by: str) -> None:  # noqa: F811
    other = {"light": "dark", "dark": "light"}[scheme]
    # Without transitions: a colour on its way to another is neither.
    scheme_of_system = scheme if by == "system" else other
    with open_page(demo.url, color_scheme=scheme_of_system, reduced_motion="reduce") as chat:
        chat.wait_until_ready()
        if by == "toggle":
            while chat.page.locator("#theme").get_attribute("aria-label") != f"Theme: {scheme}":
                chat.page.locator("#theme").click()
            chat.page.reload()
            chat.wait_until_ready()
        full_page(chat)
        found = chat.page.evaluate(CONTRASTS)
        chat.button("Settings").click()
        found += chat.page.evaluate(CONTRASTS)
        assert len(found) > 80
        assert [entry for entry in found if entry[0] < entry[1]] == []
        ground = chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(253, 252, 249)", "dark": "rgb(25, 24, 22)"}[scheme]


def test_every_control_has_a_name(page: ChatPage) -> None:
    """In the accessibility tree that Chromium gives screen readers."""
    full_page(page)
    session = page.page.context.new_cdp_session(page.page)
    session.send("Accessibility.enable")
    controls = ("button", "textbox", "spinbutton", "combobox", "link", "dialog", "navigation", "article", "region")
    seen = set()

    def check() -> None:
        for node in session.send("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if role in controls and not node["ignored"]:
                seen.add(role)
                assert node.get("name", {}).get("value"), node

    check()
    page.button("Settings").click()
    check()
    assert {"button", "textbox", "spinbutton", "combobox", "link", "dialog", "navigation", "article"} <= seen
    page.page.keyboard.press("Escape")
    roles = page.page.locator("body").aria_snapshot()
    for landmark in ("navigation", "main", "banner"):
        assert landmark in roles
    levels = page.page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].filter((h) => h.checkVisibility()).map((h) => h.tagName)"
    )
    assert levels[:3] == ["H1", "H2", "H3"]  # no level is left out before the answer's own


def test_screen_readers_get_answers_once(page: ChatPage, slow: None) -> None:
    set_sampling(page, max_tokens=25)
    page.page.evaluate(
        """() => {
            window.said = [];
            const live = [...document.querySelectorAll("[aria-live], [role=status], [role=alert], [role=log]")];
            for (const node of live) {
                new MutationObserver(() => window.said.push(node.textContent)).observe(node,
                    { childList: true, characterData: true, subtree: true });
            }
        }"""
    )
    page.ask(START)
    said = page.page.evaluate("window.said")
    assert said[0] == "Answering"
    assert len(said) == 2, "once at the start, once at the end"
    assert " ".join(page.contents()[1].split()) in " ".join(said[1].split())


def test_reduced_motion(demo: Running, open_page: OpenPage) -> None:  # noqa: F811
    state = ServerState(ServerSettings(model_name="demo"), step="load weights")
    with listening(state) as running:
        for wish, name in (("no-preference", "pulse"), ("reduce", "none")):
            with open_page(running.url, reduced_motion=wish) as chat:
                playwright.expect(chat.page.locator("#dot")).to_have_attribute("data-status", "loading")
                assert chat.page.evaluate("getComputedStyle(document.getElementById('dot')).animationName") == name


# Long answers --------------------------------------------------------------------------------------------------------


def test_long_answers_are_rendered_by_frame_and_block(page: ChatPage) -> None:
    """5,000 tokens of 40 paragraphs: as many renderings as frames at most, and finished paragraphs stay as they are."""
    words = [{"content": ("\n\n" if i % 125 == 0 else " ") + f"word{i}"} for i in range(5000)]
    page.page.evaluate(
        """() => {
            window.added = 0;
            new MutationObserver((all) => {
                for (const one of all) for (const node of one.addedNodes) window.added += node.nodeName === "P";
            }).observe(document.getElementById("messages"), { childList: true, subtree: true });
            window.frames_ = 0;
            const count = () => { window.frames_++; requestAnimationFrame(count); };
            requestAnimationFrame(count);
        }"""
    )
    page.stub_stream(*words)
    page.ask("go")
    assert page.answers.locator(".content p").count() == 40
    added, frames = page.page.evaluate("[window.added, window.frames_]")
    assert 40 <= added <= 40 + 2 * (frames + 2)


def test_newest_text_stays_in_view_unless_one_scrolls_away(page: ChatPage, slow: None) -> None:
    page.stub_stream({"content": "\n\n".join(f"paragraph {i}" for i in range(60))})
    page.ask("go")
    page.unstub()
    scroll = (
        "() => { const s = document.getElementById('scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight; }"
    )
    assert page.page.evaluate(scroll) < 2
    set_sampling(page, max_tokens=30)
    page.send(START)
    playwright.expect(page.answers.last.locator(".stats")).to_contain_text("tokens")
    assert page.page.evaluate(scroll) < 2
    page.page.evaluate("document.getElementById('scroll').scrollTop = 100")
    playwright.expect(page.button("To the newest message")).to_be_visible()
    page.wait_until_answered()
    assert page.page.evaluate("document.getElementById('scroll').scrollTop") == 100
    page.button("To the newest message").click()
    assert page.page.evaluate(scroll) < 2
    playwright.expect(page.button("To the newest message")).to_be_hidden()
