"""IsolatedTemplate: a chat template that a request brings, rendered in a process of its own with little memory.

The sandbox keeps a template from everything but the conversation. It can't keep it from filters and methods that make
something huge in one call (`center`, `replace`, `join` of long texts ...), or that take a minute in one: only the
operating system can.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

from puna.engine.chat_template import ChatTemplate, check_syntax

_MAX_BYTES: Final = 256 * 1024 * 1024  # of the whole process, which has 25 MB when it begins
_MAX_CPU_SECONDS: Final = 6  # one more than the sandbox gives a rendering, which can say why it ended
_PATIENCE: Final = 60.0  # seconds, on a machine that has other work
_CODE: Final = "import sys; sys.path[:] = {path!r}; from puna.engine.isolated_template import main; main()"
_DONE: Final = b"+"  # what the answer begins with; errors begin otherwise


class IsolatedTemplate(ChatTemplate):
    """A rendering takes a tenth of a second more than a `ChatTemplate`'s, to start the process.

    Raises ValueError where the template is none; what else is wrong with it shows when it is rendered.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        check_syntax("default", source)
        self._sources = {"default": source}
        self._special_tokens = dict(special_tokens)

    def _render(self, name: str, variables: dict[str, Any]) -> str:
        """Without the environment, which may have keys. Raises ValueError whatever the process ends with."""
        code = _CODE.format(path=sys.path)
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", code],
                input=json.dumps([self._sources[name], variables]).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
                timeout=_PATIENCE,
                env={},
                start_new_session=True,  # Ctrl-C is for the server, which lets requests end
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"the chat template takes more than {_PATIENCE:g} seconds") from None
        if done.returncode != 0 or not done.stdout:
            raise ValueError(
                f"the chat template takes more than {_MAX_BYTES // 2**20} MiB of memory, or {_MAX_CPU_SECONDS} seconds"
            )
        answer = done.stdout[1:].decode("utf-8", "surrogatepass")
        if not done.stdout.startswith(_DONE):
            raise ValueError(answer)
        return answer


def main() -> None:
    """What the process does: reads the template and its variables, and writes the text or what is wrong."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_CPU_SECONDS, _MAX_CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, variables = json.load(sys.stdin.buffer)
    try:
        answer = _DONE + ChatTemplate({"default": source}, {})._render("default", variables).encode(
            "utf-8", "surrogatepass"
        )
    except ValueError as error:
        answer = b"-" + str(error).encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(answer)
