"""Hub ids, against a server on this machine that speaks as much of the hub's API as a download needs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from gguf_writer import write_gguf
from puna.checkpoints import hub, resolve_path
from puna.models import load_model

Make = Callable[..., Any]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Prints what depends on the weights, or the error.
COMMAND = """
import sys
from puna.models import load_model
try:
    print(load_model(sys.argv[1]).ln_f.weight.sum().item())
except (FileNotFoundError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Hub:
    """The stand-in: repositories are folders; `requests` are what was asked for; `cut` files end after half of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.cut: set[str] = set()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                stand_in.answer(self)

            def do_GET(self) -> None:
                stand_in.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def downloaded(self) -> list[str]:
        """The files whose content was sent, sorted."""
        prefix = f"/resolve/{COMMIT}/"
        return sorted(line.split(prefix)[1] for line in self.requests if line.startswith("GET") and prefix in line)

    def stop(self) -> None:
        """Connections are refused from then on."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        self.requests.append(f"{request.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._answer_api(request, "/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._answer_file(request, "/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._send(request, 404, b"{}")

    def _answer_api(self, request: BaseHTTPRequestHandler, repository: str, rest: list[str]) -> None:
        folder = self.folder / repository
        if not folder.is_dir():
            self._send(request, 404, b'{"error": "Repository not found"}', {"x-error-code": "RepoNotFound"})
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            answer: object = [
                {
                    "type": "file",
                    "path": str(path.relative_to(folder)),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
        else:
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            answer = {"_id": "1", "id": repository, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        self._send(request, 200, json.dumps(answer).encode())

    def _answer_file(self, request: BaseHTTPRequestHandler, repository: str, name: str) -> None:
        file = self.folder / repository / name
        if not file.is_file():
            self._send(request, 404, b"{}", {"x-error-code": "EntryNotFound", "x-repo-commit": COMMIT})
            return
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self._send(request, 200, content, {"etag": f'"{etag}"', "x-repo-commit": COMMIT}, cut=name in self.cut)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        cut: bool = False,
    ) -> None:
        request.send_response(status)
        for name, value in {"content-length": str(len(content)), **(headers or {})}.items():
            request.send_header(name, value)
        request.send_header("connection", "close")
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content[: len(content) // 2] if cut else content)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, which this process takes for the hub, with an empty cache."""
    server = Hub(tmp_path / "hub")
    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    yield server
    server.stop()


def load_elsewhere(server: Hub, tmp_path: Path, **variables: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a process that knows the server from its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    child = subprocess.run(
        [sys.executable, "-c", COMMAND, "owner/name"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**kept, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), **variables},
    )
    return child.returncode, child.stdout, child.stderr


def publish(make: Make, tmp_path: Path, architecture: str = "LlamaForCausalLM") -> Any:
    """A model with all that repositories hold beside what is needed."""
    folder = make(architecture, name="hub/owner/name")
    (folder.path / "tokenizer.json").write_text("{}")
    for extra in (
        "README.md",
        "picture.png",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "original/params.json",
        "original/consolidated.00.pth",
        "onnx/model.safetensors",
        "onnx/config.json",
        "eval/results.json",
        "model.fp16.safetensors",
        "flax_model.msgpack",
        "vocab.txt",
    ):
        (folder.path / extra).parent.mkdir(exist_ok=True)
        (folder.path / extra).write_bytes(b"not for us")
    return folder


def refused(error: type[Exception], hub_id: str = "owner/name") -> str:
    """The message, which must be one line."""
    with pytest.raises(error) as caught:
        load_model(hub_id)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NOT_DOWNLOADED = "is not a folder here, and could not be downloaded from the Hugging Face hub ("


def test_from_the_environment_then_from_the_cache(make: Make, tmp_path: Path, stand_in: Hub) -> None:
    expected = load_model(publish(make, tmp_path).path).ln_f.weight.sum()
    result = load_elsewhere(stand_in, tmp_path)
    assert result == (0, f"{expected.item()}\n", "")  # and no bar, off a terminal
    assert stand_in.downloaded() == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert not [line for line in stand_in.requests if "xet" in line]

    stand_in.requests.clear()
    assert load_elsewhere(stand_in, tmp_path, HF_HUB_OFFLINE="1") == result
    assert stand_in.requests == []
    stand_in.stop()
    assert load_elsewhere(stand_in, tmp_path)[:2] == result[:2]


def test_the_second_time_only_asks_for_news(make: Make, tmp_path: Path, stand_in: Hub) -> None:
    publish(make, tmp_path)
    first = load_model("owner/name")
    stand_in.requests.clear()
    second = load_model("owner/name")
    assert stand_in.downloaded() == []
    assert stand_in.requests != []
    stand_in.stop()
    third = load_model("owner/name")
    for model in (second, third):
        assert torch.equal(model.layers[1].mlp.proj.weight, first.layers[1].mlp.proj.weight)


def test_shards_by_the_index_alone(make: Make, tmp_path: Path, stand_in: Hub) -> None:
    folder = publish(make, tmp_path)
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "onnx/model.safetensors"):
        (folder.path / name).unlink()
    folder.write(*folder.halves(), index=True)
    (folder.path / "model-00001-of-00009.safetensors").write_bytes(b"of another split")
    for _ in range(2):
        load_model("owner/name")
        assert [name for name in stand_in.downloaded() if "safetensors" in name] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ]
    stand_in.stop()
    load_model("owner/name")


def test_bars_are_left_as_they_were(make: Make, tmp_path: Path, stand_in: Hub) -> None:
    publish(make, tmp_path)
    before = hub.are_progress_bars_disabled()
    load_model("owner/name")
    assert hub.are_progress_bars_disabled() == before


def test_not_on_the_hub(stand_in: Hub) -> None:
    message = refused(FileNotFoundError, "owner/nothing")
    assert message.startswith(f"owner/nothing {NOT_DOWNLOADED}RepositoryNotFoundError: ")
    assert "404" in message
    assert stand_in.downloaded() == []


def test_nothing_reachable(stand_in: Hub) -> None:
    stand_in.stop()
    assert f"owner/name {NOT_DOWNLOADED}" in refused(FileNotFoundError)


def test_broken_download(make: Make, tmp_path: Path, stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(make, tmp_path)
    stand_in.cut.add("model.safetensors")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # it is tried again several times, with pauses between
    assert f"owner/name {NOT_DOWNLOADED}" in refused(FileNotFoundError)
    stand_in.cut.clear()
    stand_in.requests.clear()
    load_model("owner/name")
    assert stand_in.downloaded() == ["model.safetensors"]


def test_half_a_download_and_no_network(make: Make, tmp_path: Path, stand_in: Hub) -> None:
    publish(make, tmp_path)
    huggingface_hub.snapshot_download("owner/name", allow_patterns=["config.json"])
    stand_in.stop()
    refused(FileNotFoundError)


def test_pickles_are_not_fetched(make: Make, tmp_path: Path, stand_in: Hub) -> None:
    folder = publish(make, tmp_path)
    for file in folder.path.rglob("*.safetensors"):
        file.unlink()
    message = refused(ValueError)
    assert message.startswith("owner/name has no weights in safetensors files on the hub")
    assert "save_pretrained" in message
    assert stand_in.downloaded() == ["config.json", "generation_config.json", "tokenizer.json"]


def test_only_the_makers_layout(make: Make, tmp_path: Path, stand_in: Hub) -> None:
    """A repository with params.json and consolidated.safetensors, but no config.json."""
    folder = publish(make, tmp_path)
    (folder.path / "config.json").unlink()
    (folder.path / "params.json").write_text("{}")
    assert "consolidated.safetensors is damaged or incomplete" in refused(ValueError)
    assert [name for name in stand_in.downloaded() if name.endswith(".safetensors")] == ["consolidated.safetensors"]


@pytest.mark.parametrize(
    "path", ["a/b/c", "owner/", "/owner/name", "owner name/x", "-x/y", "nothing", "http://x.org/y"]
)
def test_not_an_id(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="is not a folder, nor the id of a model"):
        resolve_path(path)


def test_a_folder_goes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_path("owner/name") == Path("owner/name")


def test_nothing_of_the_hub_is_imported_for_a_folder(make: Make) -> None:
    command = (
        "import sys; from puna.models import load_model; load_model(sys.argv[1]); "
        "print([name for name in sys.modules if name in ('huggingface_hub.hf_api', 'httpx', 'httpx2', 'requests')])"
    )
    child = subprocess.run(
        [sys.executable, "-c", command, str(make().path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert child.stdout == "[]\n"


def test_demo_is_the_model_in_the_package_unless_a_folder_of_that_name_has_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = resolve_path("demo")
    assert (packaged / "model.safetensors").is_file()
    (tmp_path / "demo").mkdir()
    assert resolve_path("demo") == packaged
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert resolve_path("demo") == Path("demo")


def test_one_gguf_file_of_a_repository(make: Make, tmp_path: Path, stand_in: Hub) -> None:
    folder = publish(make, tmp_path)
    plain = make(name="plain")
    write_gguf(plain.path, folder.path / "model-Q8_0.gguf", "Q8_0")
    write_gguf(plain.path, folder.path / "model-F32.gguf")
    expected = load_model(plain.path)
    for _ in range(2):  # the second time from the cache
        model = load_model("owner/name:model-F32.gguf")
        assert torch.equal(model.layers[1].mlp.proj.weight, expected.layers[1].mlp.proj.weight)
        assert stand_in.downloaded() == ["model-F32.gguf"]
    assert refused(FileNotFoundError, "owner/name:none.gguf") == (
        "owner/name on the hub has no file none.gguf: look at its list of files"
    )
    assert NOT_DOWNLOADED in refused(FileNotFoundError, "owner/none:model-F32.gguf")


def test_all_parts_of_a_split_gguf_model(tmp_path: Path, stand_in: Hub) -> None:
    folder = tmp_path / "hub" / "owner" / "name" / "Q4"
    folder.mkdir(parents=True)
    names = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for name in (*names, "m-00001-of-00003.gguf", "other.gguf"):
        (folder / name).write_bytes(name.encode())  # the cache keeps one copy of the same bytes
    assert resolve_path(f"owner/name:Q4/{names[0]}").name == names[0]
    assert stand_in.downloaded() == [f"Q4/{name}" for name in names]
