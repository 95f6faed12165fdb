"""The import rules of the source tree (docs/architecture.md), checked on the syntax trees of src/puna.

The tables come first; change them when the architecture changes. `problems` applies every rule to one file. Each rule
has examples at the end, good and bad, so that a checker that reports nothing is found out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest

SOURCE: Final = Path(__file__).resolve().parent.parent / "src" / "puna"
MAX_LINES: Final = 600

# What each package may import; arrows point down. What the named packages may import is allowed with them, and every
# package may import itself. Nothing may import serving or cli, but for the command `puna serve`.
MAY_IMPORT: Final = MappingProxyType(
    {
        "config": "",
        "mapping": "",
        "_kernels": "",
        "distributed": "mapping",
        "ops": "_kernels",
        "quantization": "ops",
        "layers": "quantization ops distributed config mapping",
        "checkpoints": "config quantization",
        "models": "layers checkpoints quantization ops distributed config mapping",
        "scheduling": "config",
        "runtime": "models layers ops scheduling distributed config mapping",
        "engine": "planning scheduling runtime models checkpoints distributed config mapping",
        "training": "models checkpoints engine layers distributed config mapping",
        "planning": "scheduling config mapping",
        "llm": "engine scheduling runtime models checkpoints distributed config mapping",
        "evaluation": "llm engine",
        "serving": "engine llm config",
        "cli": "serving llm engine evaluation training planning",
        "__main__": "cli",
    }
)

# Names that only these files may use, imported or reached as attributes. No file: nowhere.
ONLY_IN: Final = MappingProxyType(
    {
        "triton": ("ops/triton_*.py",),
        "puna._kernels": ("ops/*",),  # not whoever may import ops: the compiled module has one caller
        "torch.cuda": ("runtime/*", "distributed.py", "distributed/*", "training/*", "ops/triton_*.py"),
        "os.environ": ("cli/*", "distributed.py", "distributed/*"),
        "os.getenv": ("cli/*", "distributed.py", "distributed/*"),
        "pydantic": ("serving/*",),
        "ray": ("engine/*ray*.py",),
        "transformers": (),  # an oracle of the tests, never a part of the product
        "sentencepiece": (),
        "pickle": (),  # loading one runs whatever it holds
    }
)

# Folders and files that work without torch: what decides is tested in microseconds and planned without a model.
NO_TORCH: Final = ("config/*", "mapping.py", "scheduling/*", "planning/*")

# Imports inside functions: in these files, to keep the command line quick, and of these optional packages anywhere.
LATE_IMPORT_FILES: Final = ("__init__.py", "cli/*")
LATE_IMPORT_PACKAGES: Final = (
    "puna._kernels",
    "puna.ops.triton_argmax",
    "puna.ops.triton_logprobs",
    "puna.ops.triton_sampling",
    "puna.ops.triton_table",
    "llguidance",
    "psutil",
    "ray",
    "triton",
)

MUTABLE_CALLS: Final = frozenset(
    ["list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict", "ChainMap", "local"]
)


def reachable(package: str) -> frozenset[str]:
    """Everything that `package` may import, itself included unless it is in no row of the table."""
    found: set[str] = set()
    waiting = [package]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(MAY_IMPORT.get(name, "").split())
    return frozenset(found)


def problems(source: str, path: str) -> list[str]:
    """Every broken rule as 'path:line: what'. `path` is relative to the package's folder, with forward slashes."""
    tree = ast.parse(source)
    found = set()
    if not (ast.get_docstring(tree) or "").strip():
        found.add((1, "no module docstring that says what the file owns"))
    lines = len(source.splitlines())
    if lines > MAX_LINES:
        found.add((lines, f"{lines} lines, more than {MAX_LINES}"))
    found.update(_import_problems(tree, path))
    found.update(_use_problems(tree, path))
    found.update(_late_import_problems(tree, path))
    found.update(_state_problems(tree))
    return [f"{path}:{line}: {what}" for line, what in sorted(found)]


def _imported(node: ast.AST, path: str) -> Iterator[tuple[str, str]]:
    """(name bound in the file, absolute dotted name) of one import statement."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0], alias.name)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = ["puna", *path.split("/")[:-1]]
            parents = parents[: len(parents) - node.level + 1]
            base = ".".join([*parents, base] if base else parents)
        for alias in node.names:
            yield alias.asname or alias.name, f"{base}.{alias.name}"


def _import_problems(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    """Edges between puna's packages."""
    package = path.split("/")[0].removesuffix(".py")
    if package == "__init__":  # the public names, which come from everywhere
        return
    if package not in MAY_IMPORT:
        yield 1, f"package {package!r} is not in MAY_IMPORT: say there what it may import"
        return
    allowed = reachable(package)
    for node in ast.walk(tree):
        names = [name for _, name in _imported(node, path)]
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            parts = name.split(".")
            if parts[0] != "puna" or name == "puna.__version__":
                continue
            target = parts[1] if len(parts) > 1 else ""
            if target not in MAY_IMPORT:
                yield node.lineno, f"imports {name}: import from the module that defines it, not from the facade"
            elif target not in allowed:
                yield node.lineno, f"{package} may not import {target}"


def _use_problems(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    """Uses of names with a restricted place, torch where there should be none, and hasattr."""
    bound: dict[str, str] = {}
    used: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        for local, name in _imported(node, path):
            used.append((node.lineno, name))
            # `import a.b` binds a; `import a.b as c` and `from a import b` bind the whole.
            bound[local] = local if isinstance(node, ast.Import) and name.startswith(f"{local}.") else name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in bound:
                used.append((node.lineno, f"{bound[root]}.{rest}"))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            yield node.lineno, "hasattr: ask the type, or give the protocol a method"
    for line, name in used:
        for restricted, files in ONLY_IN.items():
            if _within(name, restricted) and not any(fnmatch(path, pattern) for pattern in files):
                yield line, f"{restricted} may be used only in {', '.join(files) or 'no file'}"
        if _within(name, "torch") and any(fnmatch(path, pattern) for pattern in NO_TORCH):
            yield line, "torch has no place here"


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _late_import_problems(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    """Imports inside functions."""
    if any(fnmatch(path, pattern) for pattern in LATE_IMPORT_FILES):
        return
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            for _, name in _imported(node, path):
                if not any(_within(name, package) for package in LATE_IMPORT_PACKAGES):
                    yield node.lineno, f"imports {name} inside a function"


def _state_problems(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Module-level state: containers that can change, and names that functions rebind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}: pass it, or keep it in an object"
    for statement in _module_level(tree.body):
        targets: list[ast.expr] = []
        value = None
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
            targets, value = [statement.target], statement.value
        if value is None or any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            continue
        if _is_mutable(value):
            yield statement.lineno, "mutable module-level container: a tuple, a frozenset or a MappingProxyType instead"


def _module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run at import, those inside if, try, with and loops included."""
    for statement in body:
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _module_level(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _module_level(handler.body)


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if isinstance(value, ast.Tuple):
        return any(_is_mutable(element) for element in value.elts)
    if isinstance(value, ast.BinOp):
        return _is_mutable(value.left) or _is_mutable(value.right)
    if isinstance(value, ast.IfExp):
        return _is_mutable(value.body) or _is_mutable(value.orelse)
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func).split(".")[-1].split("[")[0]
        if called == "MappingProxyType" and value.args and isinstance(value.args[0], ast.Dict):
            return any(_is_mutable(element) for element in value.args[0].values)
        return called in MUTABLE_CALLS
    return False


def _files() -> list[str]:
    return sorted(file.relative_to(SOURCE).as_posix() for file in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", _files())
def test_file_keeps_the_rules(path: str) -> None:
    found = problems((SOURCE / path).read_text(encoding="utf-8"), path)
    assert not found, "\n" + "\n".join(f"src/puna/{line}" for line in found)


def test_the_arrows_point_down_only() -> None:
    for package, allowed in MAY_IMPORT.items():
        for target in allowed.split():
            assert target in MAY_IMPORT, f"{package} names {target}, which has no row"
            assert package not in reachable(target), f"{package} and {target} may import each other"


def test_nothing_imports_serving_or_cli() -> None:
    assert [name for name in MAY_IMPORT if "cli" in reachable(name)] == ["cli", "__main__"]
    assert [name for name in MAY_IMPORT if "serving" in reachable(name)] == ["serving", "cli", "__main__"]


# Each pair of files differs in what the rule is about.
BAD: Final = (
    ("config.py", "from puna.mapping import Mapping", "config may not import mapping"),
    ("mapping.py", "import puna.config", "mapping may not import config"),
    ("ops/cpu.py", "from puna.layers.linear import ColumnLinear", "ops may not import layers"),
    ("ops/cpu.py", "from ..layers import linear", "ops may not import layers"),
    ("ops/cpu.py", "from puna import config", "ops may not import config"),
    ("ops/cpu.py", "if TYPE_CHECKING:\n    from puna.config import LLaMAConfig", "ops may not import config"),
    ("layers/linear.py", "from puna.models import load_model", "layers may not import models"),
    ("models/llama.py", "from puna.runtime import KVPool", "models may not import runtime"),
    ("models/llama.py", "importlib.import_module('puna.runtime')", "models may not import runtime"),
    ("models/llama.py", "from puna import LLaMAConfig", "not from the facade"),
    ("models/llama.py", "import puna", "not from the facade"),
    ("scheduling/scheduler.py", "from puna.runtime import KVPool", "scheduling may not import runtime"),
    ("engine/engine.py", "import puna.serving.server", "engine may not import serving"),
    ("serving/server.py", "from puna.cli import app", "serving may not import cli"),
    ("extras/thing.py", "", "'extras' is not in MAY_IMPORT"),
    ("layers/linear.py", "from puna import _kernels", "puna._kernels may be used only in ops/*"),
    ("layers/linear.py", "import triton.language as tl", "triton may be used only in"),
    ("ops/cpu.py", "import triton", "triton may be used only in"),
    ("layers/linear.py", "import torch\nx = torch.cuda.is_available()", "torch.cuda may be used only in"),
    ("layers/linear.py", "import torch as t\nx = t.cuda.current_device()", "torch.cuda may be used only in"),
    ("layers/linear.py", "from torch import cuda", "torch.cuda may be used only in"),
    ("layers/linear.py", "from torch.cuda import Stream", "torch.cuda may be used only in"),
    ("engine/engine.py", "import os\nx = os.environ['HOME']", "os.environ may be used only in"),
    ("engine/engine.py", "from os import environ as e", "os.environ may be used only in"),
    ("engine/engine.py", "import os.path\nx = os.getenv('HOME')", "os.getenv may be used only in"),
    ("engine/engine.py", "import pydantic", "pydantic may be used only in serving/*"),
    ("engine/engine.py", "import ray", "ray may be used only in"),
    ("engine/text.py", "from transformers import AutoTokenizer", "transformers may be used only in no file"),
    ("engine/text.py", "import sentencepiece", "sentencepiece may be used only in no file"),
    ("training/state.py", "import pickle", "pickle may be used only in no file"),
    ("scheduling/scheduler.py", "import torch", "torch has no place here"),
    ("scheduling/scheduler.py", "from torch import nn", "torch has no place here"),
    ("planning/memory.py", "import torch.nn.functional as F", "torch has no place here"),
    ("models/llama.py", "def f():\n    import json", "imports json inside a function"),
    ("models/llama.py", "class A:\n    async def f(self):\n        from json import loads", "inside a function"),
    ("models/llama.py", "x = hasattr(torch, 'float8')", "hasattr"),
    ("models/llama.py", "NAMES = []", "mutable module-level container"),
    ("models/llama.py", "NAMES: Final = {'a': 1}", "mutable module-level container"),
    ("models/llama.py", "NAMES = {x for x in 'ab'}", "mutable module-level container"),
    ("models/llama.py", "NAMES = ('a', [])", "mutable module-level container"),
    ("models/llama.py", "NAMES = MappingProxyType({'a': []})", "mutable module-level container"),
    ("models/llama.py", "CACHE = collections.defaultdict(list)", "mutable module-level container"),
    ("models/llama.py", "if True:\n    CACHE = dict[str, int]()", "mutable module-level container"),
    ("models/llama.py", "try:\n    pass\nexcept ImportError:\n    CACHE = {}", "mutable module-level container"),
    ("models/llama.py", "def f():\n    global count\n    count = 1", "global count"),
    ("models/llama.py", "x = 1\n" * 600, "601 lines, more than 600"),
)

GOOD: Final = (
    ("layers/linear.py", "from puna.ops import table\nfrom puna.layers import rotary\nfrom . import rotary"),
    ("engine/engine.py", "from puna.layers import rotary"),  # through runtime
    ("engine/engine.py", "from puna import __version__"),
    ("ops/cpu.py", "from puna import _kernels"),
    ("ops/cpu.py", "def kernels():\n    from puna import _kernels"),
    ("ops/triton_attention.py", "import torch, triton\nx = torch.cuda.current_device()"),
    ("runtime/graph.py", "import torch\nx = torch.cuda.CUDAGraph()"),
    ("layers/linear.py", "import torch\nx = torch.device('cuda')"),
    ("cli/serve.py", "import os\nfrom puna.serving import server\ndef f():\n    import torch\n    os.environ['A']"),
    ("distributed.py", "import os\nRANK = os.environ['RANK']"),
    ("serving/protocol.py", "from pydantic import BaseModel"),
    ("__init__.py", "from puna.models import load_model\ndef f():\n    import puna.cli"),
    ("models/llama.py", "__all__ = ['a']\nA = ('a', 'b')\nB = frozenset(['a'])\nC = MappingProxyType({'a': ('b',)})"),
    ("models/llama.py", "class A:\n    x = 1\ndef f():\n    y = []\n    return y"),
    ("models/llama.py", "x = 1\n" * 599),
)


@pytest.mark.parametrize(("path", "source", "message"), BAD)
def test_bad_example_is_reported(path: str, source: str, message: str) -> None:
    assert any(message in found for found in problems(f'"""Owns it."""\n{source}', path))


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_good_example_passes(path: str, source: str) -> None:
    assert problems(f'"""Owns it."""\n{source}', path) == []


@pytest.mark.parametrize("source", ["", "import os", "# Owns it.", '"""   """'])
def test_missing_docstring_is_reported(source: str) -> None:
    assert any("no module docstring" in found for found in problems(source, "models/llama.py"))
