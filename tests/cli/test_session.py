"""OpenedModel: what flags and the environment come to before an engine is started."""

from __future__ import annotations

import pytest
import torch

from puna.cli.options import EngineFlags, ModelFlags
from puna.cli.session import OpenedModel


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), ("", None), ("relative/caches", None), ("/var/caches", "/var/caches/puna")]
)
def test_measurements_go_where_the_environment_has_caches(
    value: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    flags = ModelFlags(model="demo", threads=torch.get_num_threads())
    assert OpenedModel.open(flags, EngineFlags()).limits.tuning_dir == expected
