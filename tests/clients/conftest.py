"""A server for the clients that people have: chat with tools, a context that holds their schemas, a real socket."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from puna.engine.engine import Engine
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import (  # noqa: F401  the small models, and servers on them
    Running,
    dense,
    folder,
    listening,
    make_folder,
    serve,
    server,
)

# As Qwen writes conversations and calls, over single bytes.
TOOLS_TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="session")
def tools_folder(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The small model with a template that knows tools, and room for 4096 tokens, which are bytes."""
    model = tmp_path_factory.mktemp("clients") / "model"
    shutil.copytree(make_folder(max_position_embeddings=4096), model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TOOLS_TEMPLATE}))
    return model


@pytest.fixture(scope="session")
def shared_server(tools_folder: Path) -> Iterator[Running]:
    """One server for everything that asks it nothing special."""
    engine = Engine.from_pretrained(str(tools_folder))
    with listening(ServerState(ServerSettings(model_name="small"), engine, "ready")) as running:
        yield running
    engine.shutdown()


@pytest.fixture
def clients_server(shared_server: Running) -> Iterator[Running]:
    """The shared one; every test must leave it idle, with all its blocks free."""
    yield shared_server
    shared_server.wait_until_idle()
