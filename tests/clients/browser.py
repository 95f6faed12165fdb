"""Chromium for the chat page's tests, and what no test may leave behind: errors, or requests to anyone else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (make test-clients)")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SECONDS = 60  # until something that never comes fails a test
OpenPage = Callable[..., AbstractContextManager["ChatPage"]]


class ChatPage:
    """The page as a person sees it. `page` is playwright's."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.url = url
        self.problems: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", self._see)
        page.on("dialog", self._refuse)

    def _hear(self, message: Any) -> None:
        # The browser's own line for an answer that is no success, which tests with such answers expect.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.problems.append(f"{message.type}: {message.text}")

    def _see(self, request: Any) -> None:
        if not request.url.startswith((self.url, f"blob:{self.url}")):
            self.problems.append(f"request to {request.url}")

    def _refuse(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self) -> None:
        self.page.goto(self.url)

    def wait_until_ready(self) -> None:
        playwright.expect(self.page.locator("#dot")).to_have_attribute("data-status", "ready")

    @property
    def box(self) -> Any:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def answers(self) -> Any:
        return self.page.get_by_role("article", name="Answer")

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def send(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def wait_until_answered(self) -> None:
        playwright.expect(self.page.locator("[data-running]")).to_have_count(0)
        playwright.expect(self.button("Send")).to_be_visible()

    def ask(self, text: str) -> None:
        """Sends, and waits for the whole answer."""
        self.send(text)
        self.wait_until_answered()

    def stored(self) -> list[dict[str, Any]]:
        """The conversations that the browser keeps, newest first."""
        texts = self.page.evaluate(
            "Object.keys(localStorage).filter((key) => key.startsWith('puna.chat.')).map((key) => localStorage[key])"
        )
        return sorted(map(json.loads, texts), key=lambda found: -found["updated"])

    def contents(self) -> list[str]:
        """Of the newest conversation's messages."""
        return [message["content"] for message in self.stored()[0]["messages"]]

    def stub_stream(self, *deltas: dict[str, Any], end: str = "data: [DONE]\n\n") -> list[dict[str, Any]]:
        """From now on, these are what the API streams; returns the bodies of the requests, which come later."""
        asked: list[dict[str, Any]] = []
        choices = [{"index": 0, "delta": delta, "finish_reason": None, "token_ids": [7]} for delta in deltas]
        body = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices) + end

        def answer(route: Any) -> None:
            asked.append(route.request.post_data_json)
            route.fulfill(status=200, content_type="text/event-stream", body=body)

        self.page.route("**/v1/chat/completions", answer)
        return asked

    def stub_error(self, status: int, message: str) -> None:
        body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})
        self.page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=status, content_type="application/json", body=body),
        )

    def unstub(self) -> None:
        self.page.unroute("**/v1/chat/completions")


# Not of the session: each module that imports this has one of its own, and playwright can't be started twice at once.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as it:
        browser = it.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> OpenPage:
    """A page with a browser profile of its own; options are playwright's. Fails where the page had a problem."""

    @contextmanager
    def open_one(url: str, **options: Any) -> Iterator[ChatPage]:
        context = chromium.new_context(**options)
        context.set_default_timeout(SECONDS * 1000)
        chat = ChatPage(context.new_page(), url + "/")
        try:
            chat.open()
            yield chat
            assert chat.problems == []
        finally:
            context.close()

    playwright.expect.set_options(timeout=SECONDS * 1000)
    return open_one
