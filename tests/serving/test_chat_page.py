"""How the chat page's files are sent. What the page does is in tests/clients, in a browser."""

from __future__ import annotations

import re
from importlib import resources

import httpx
import pytest

from puna.serving.chat_page import PAGE_PATHS
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import listening

FOLDER = resources.files("puna.serving") / "page"


def test_every_file_of_the_page_is_sent_and_nothing_else() -> None:
    names = {file.name for file in FOLDER.iterdir()}
    assert {"/"} | {f"/page/{name}" for name in names - {"index.html"}} == PAGE_PATHS
    named = set()
    for name in names - {"icon.svg"}:
        text = (FOLDER / name).read_text(encoding="utf-8")
        named |= set(re.findall(r'(?:src|href)="(page/[^"]+)"', text))
        named |= {f"page/{module}" for module in re.findall(r'^import .* from "\./(.+)";$', text, re.MULTILINE)}
        addresses = set(re.findall(r"https?://[\w.-]+", text)) - {"http://www.w3.org"}  # SVG's namespace
        assert not addresses, f"{name} names {addresses}: the page loads nothing from elsewhere"
    assert named == {path[1:] for path in PAGE_PATHS} - {""}


def test_page_needs_no_key_and_no_model() -> None:
    with listening(ServerState(ServerSettings(model_name="small", api_keys=("secret",)))) as running:
        for path in PAGE_PATHS:
            answer = httpx.get(running.url + path)
            assert answer.status_code == 200
            assert answer.content == (FOLDER / (path.removeprefix("/page/").strip("/") or "index.html")).read_bytes()
        assert httpx.get(f"{running.url}/page/nothing.js").status_code == 401
        assert running.http.get("/page/nothing.js").status_code == 404
        assert running.http.get("/page/../chat_page.py").status_code == 404
        assert running.http.get("/page/%2e%2e/chat_page.py").status_code == 404


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_headers(path: str) -> None:
    with listening(ServerState(ServerSettings(model_name="small"))) as running:
        got = running.http.get(path)
        head = running.http.head(path)
        assert head.status_code == 200
        assert head.content == b""
        for name in ("content-length", "content-type", "etag", "content-security-policy", "cache-control"):
            assert head.headers[name] == got.headers[name]
        policy = dict(rule.split(" ", 1) for rule in got.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert got.headers["x-content-type-options"] == "nosniff"
        assert got.headers["referrer-policy"] == "no-referrer"
        tag = got.headers["etag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = running.http.get(path, headers={"if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert running.http.get(path, headers={"if-none-match": '"other"'}).status_code == 200
        assert running.http.post(path).status_code == 405


def test_page_is_no_part_of_the_api_document() -> None:
    with listening(ServerState(ServerSettings(model_name="small"))) as running:
        assert not PAGE_PATHS & set(running.http.get("/openapi.json").json()["paths"])
