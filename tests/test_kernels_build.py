"""The compiled module as it was built, and the package without it: importing puna needs neither it nor torch."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

SOURCE: Final = Path(__file__).resolve().parent.parent / "src"
AVX_FEATURES: Final = frozenset(["avx2", "fma", "f16c", "avx_vnni"])
AVX512_FEATURES: Final = frozenset(["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"])
FEATURES: Final = AVX_FEATURES | AVX512_FEATURES | {"amx_int8", "amx_bf16"}
SLOW_MODULES: Final = frozenset(["torch", "tokenizers", "transformers", "numpy", "jinja2", "rich", "typer"])


def run_python(code: str, *options: str) -> list[str]:
    """The lines that `code` prints in a process of its own, where only the source tree is added to the path."""
    code = f"import sys\nsys.path.insert(0, {str(SOURCE)!r})\n{code}"
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "i686"), reason="compares with Linux on x86"
)
def test_cpu_features_are_those_of_the_kernel() -> None:
    kernels = pytest.importorskip("puna._kernels", reason="the compiled module is not built here")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next(line for line in lines if line.startswith("flags")).partition(":")[2].split()
    features = kernels.cpu_features()
    assert len(features) == len(set(features))
    assert set(features) == FEATURES & set(flags)


def test_package_imports_from_the_source_tree_alone() -> None:
    # -S leaves out every installed package; a source tree that was built in place has the module, so it is blocked.
    code = "sys.modules['puna._kernels'] = None\nimport puna\nprint(puna.__version__, puna.__file__)"
    (line,) = run_python(code, "-S")
    version, file = line.split(maxsplit=1)
    assert version.count(".") == 2
    assert Path(file) == SOURCE / "puna" / "__init__.py"


def test_every_public_name_is_there_without_the_compiled_module() -> None:
    code = """
sys.modules["puna._kernels"] = None
import puna
assert set(puna.__all__) <= set(dir(puna))
for name in puna.__all__:
    print(name, getattr(puna, name) is getattr(puna, name))
try:
    import puna._kernels
except ImportError:
    print("blocked")
"""
    import puna

    assert run_python(code) == [f"{name} True" for name in puna.__all__] + ["blocked"]


def test_unknown_name_is_an_attribute_error() -> None:
    import puna

    with pytest.raises(AttributeError, match="no attribute 'LLaMAForImages'"):
        puna.LLaMAForImages  # noqa: B018


def test_import_puna_loads_nothing_slow() -> None:
    loaded = run_python("import puna\nprint(*sys.modules)")[0].split()
    assert "puna" in loaded
    assert SLOW_MODULES.isdisjoint(loaded)


def test_puna_help_loads_no_torch() -> None:
    code = """
from puna.cli import main
try:
    code = main(["--help"])
except SystemExit as exit:
    code = exit.code
assert not code, code
print(*sys.modules)
"""
    *printed, loaded = run_python(code)
    assert any("generate" in line for line in printed)
    assert {"torch", "tokenizers", "transformers", "numpy"}.isdisjoint(loaded.split())
