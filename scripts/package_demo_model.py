"""Puts a finished run of the demo model into the package: the weights, and the files that say how to use them.

python scripts/package_demo_model.py RUN src/puna/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from puna.checkpoints.writer import json_bytes

MOST_BYTES = 8_000_000  # what the package may hold

# At the temperature 1 the words fit each other less often, and at 0 every story is about the same girl. Without the
# penalty some stories fall into a loop: of 16 stories' sequences of four words, 3 in 100 had come before in the same
# story, and 6 in 1,000 with it.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}

# The model continues a story; it knows no conversation. So the last message is taken as a story's beginning, and what
# was said before is left out. What it could not follow is refused.
CHAT_TEMPLATE = (
    "{% if messages[-1].role != 'user' %}"
    "{{ raise_exception('the demo model continues the beginning of a story: the last message must be the user\\'s') }}"
    "{% endif %}"
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('the demo model only continues stories: it takes no system message') }}"
    "{% endif %}"
    "{% if tools %}{{ raise_exception('the demo model only continues stories: it takes no tools') }}{% endif %}"
    "{{ bos_token }}{{ messages[-1].content | trim }}"
)


def main() -> None:
    run, package = Path(sys.argv[1]), Path(sys.argv[2])
    package.mkdir(parents=True, exist_ok=True)
    generation = json.loads((run / "generation_config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((run / "tokenizer_config.json").read_text(encoding="utf-8"))
    files = {
        "config.json": (run / "config.json").read_bytes(),
        "generation_config.json": json_bytes({**generation, **SAMPLING}),
        "model.safetensors": (run / "model.safetensors").read_bytes(),
        "tokenizer.json": (run / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": json_bytes({**tokenizer, "chat_template": CHAT_TEMPLATE}),
    }
    total = sum(map(len, files.values()))
    if total > MOST_BYTES:
        raise SystemExit(f"the files have {total} bytes, and the package takes {MOST_BYTES}: train a smaller model")
    for name, content in files.items():
        (package / name).write_bytes(content)
        print(f"{name}: {len(content)} bytes")
    print(f"together: {total} bytes")


if __name__ == "__main__":
    main()
