"""Kernels that start before the ones ahead of them have ended: that none touches anything before it waits."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sass
from puna.ops import triton_linear, triton_matrix, triton_norm, triton_pointwise
from puna.ops.panels import PanelFormat, Panels
from puna.ops.triton_device import multiprocessors
from puna.ops.triton_overlap import bytes_ahead, launch_options
from puna.ops.triton_tuning import Tuning

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SOURCES = tuple(sorted(Path(triton_norm.__file__).parent.glob("triton_*.py")))
MEMORY = ("load", "store", "atomic", "debug_barrier", "inline_asm_elementwise", "make_block_ptr", "make_tensor")


def test_nothing_is_added_unless_told() -> None:
    weight = torch.empty(64, 4096, dtype=torch.int8)
    assert launch_options() == {}
    assert bytes_ahead(weight, 4096, 1, 1) == 0
    with Tuning(overlaps=True).used():
        assert launch_options() == {"OVERLAP": True, "launch_pdl": True}
        assert bytes_ahead(weight, 4096, 64, multiprocessors(weight.device)) == 1024
        assert bytes_ahead(weight, 4096, 64, multiprocessors(weight.device) + 1) == 512
        assert bytes_ahead(weight, 4096, 1, 1) == 4096  # there is no more
        assert bytes_ahead(weight, 4095, 1, 1) == 0
        assert bytes_ahead(weight.view(-1)[1:], 4096, 1, 1) == 0
    assert launch_options() == {}


def test_what_is_measured_does_not_start_early() -> None:
    seen: list[object] = []

    def timer(calls: Any) -> list[float | None]:
        seen.extend(call() for call in calls)
        return [1.0, 2.0]

    with Tuning(timer=timer, overlaps=True).used():
        Tuning(timer=timer, overlaps=True).choose("kernel/1", (1,), "a", ("a", "b"), lambda _: launch_options())
        assert launch_options()
    assert seen == [{}, {}]


# ---- the source


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


class _Source:
    """The kernels of a file and its functions for kernels, and its launches."""

    def __init__(self, path: Path) -> None:
        self.path, tree = path, ast.parse(path.read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        self.jitted = {
            node.name: node for node in functions if any("jit" in ast.unparse(mark) for mark in node.decorator_list)
        }
        self.launches = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        ]
        self.launched = {_name(launch.func.value) for launch in self.launches}  # type: ignore[attr-defined]


def _calls(nodes: list[ast.stmt]) -> list[str]:
    return [_name(node.func) for part in nodes for node in ast.walk(part) if isinstance(node, ast.Call)]


def _touching(sources: list[_Source]) -> set[str]:
    """Functions for kernels that touch memory, or call such."""
    calls = {name: _calls(node.body) for source in sources for name, node in source.jitted.items()}
    found = {name for name, called in calls.items() if any(call.startswith(MEMORY) for call in called)}
    found -= {"await_turn", "prefetch"}
    while more := {name for name, called in calls.items() if name not in found and found & set(called)}:
        found |= more
    return found


@pytest.fixture(scope="module")
def sources() -> list[_Source]:
    return [_Source(path) for path in SOURCES]


def test_every_launch_can_start_early(sources: list[_Source]) -> None:
    kernels = {name for source in sources for name in source.jitted}
    launches = [(source, launch) for source in sources for launch in source.launches]
    assert len(launches) > 20
    for source, launch in launches:
        where = f"{source.path.name}:{launch.lineno}"
        assert _name(launch.func.value) in kernels, f"{where}: no kernel that is known"  # type: ignore[attr-defined]
        added = [ast.unparse(keyword.value) for keyword in launch.keywords if keyword.arg is None]
        assert "launch_options()" in added, f"{where}: add **launch_options()"


def test_every_kernel_waits_before_it_touches_memory(sources: list[_Source]) -> None:
    launched, touching = {name for source in sources for name in source.launched}, _touching(sources)
    count = 0
    for source in sources:
        for name, kernel in source.jitted.items():
            if name not in launched:
                continue
            count += 1
            where = f"{source.path.name}: {name}"
            waits = [number for number, node in enumerate(kernel.body) if ast.unparse(node) == "await_turn(OVERLAP)"]
            assert len(waits) == 1, f"{where} has no await_turn(OVERLAP) of its own"
            before = kernel.body[: waits[0]]
            assert not any(isinstance(node, ast.Return) for part in before for node in ast.walk(part)), where
            early = [call for call in _calls(before) if call in touching or call.startswith(MEMORY)]
            assert not early, f"{where} calls {early} before it waits"
    assert count > 20


# ---- the machine code

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
        /*0010*/                   S2R R0, SR_TID.X ;                      /* 0x0000000000007919 */
        /*0020*/                   PREEXIT ;                               /* 0x000000000000782d */
        /*0030*/              @!P0 BRA 0x60 ;                              /* 0x0000000000000947 */
        /*0040*/                   CCTL.E.PF2 [R2] ;                       /* 0x000000000200798f */
        /*0050*/                   WARPSYNC.ALL ;                          /* 0x0000000000007948 */
        /*0060*/                   ACQBULK ;                               /* 0x000000000000782e */
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;        /* 0x0000000402047981 */
        /*0080*/                   EXIT ;                                  /* 0x000000000000794d */
        /*0090*/                   BRA 0x90;                               /* 0xfffffffc00fc7947 */
"""


def test_ways_around_the_wait_are_found() -> None:
    assert sass.before_wait(LISTING) == []
    assert sass.before_wait(LISTING.replace("S2R R0, SR_TID.X", "LDG.E R0, desc[UR4][R2.64]")) == ["LDG.E"]
    assert sass.before_wait(LISTING.replace("BRA 0x60", "BRA 0x70")) == ["LDG.E.128", "EXIT"]
    assert sass.before_wait(LISTING.replace("WARPSYNC.ALL", "@P1 EXIT")) == ["@P1 EXIT"]
    assert sass.before_wait(LISTING.replace("ACQBULK", "NOP")) == ["LDG.E.128", "EXIT"]
    assert sass.before_wait(LISTING.replace("WARPSYNC.ALL", "BRX R4 -0x10")) == ["BRX"]


CASES = (
    "test_norm.compile_norms",
    "test_pointwise.compile_pointwise",
    "test_rotary.compile_rotary",
    "attention_cases.decode_one",
    "attention_cases.decode_many",
    "attention_cases.prefill",
    "attention_cases.deterministic",
    "linear_cases.panel_tiles",
    "linear_cases.panel_formats",
    "linear_cases.whole_weights",
    "linear_cases.dense",
    "matrix_cases.plain_tiles",
    "matrix_cases.gated_tiles",
    "matrix_cases.gated_fp8_tiles",
    "fp8_cases.row_tiles",
    "fp8_cases.block_tiles",
    "test_experts.compile_rows",
    "test_experts.compile_fp8",
    "test_experts.compile_int4",
    "test_sampling.launch_all",
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_machine_code_waits_first(case: str, compiled_for_hopper: Callable[..., list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper("--overlap", case)
    assert kernels
    for kernel in kernels:
        assert kernel.get("PREEXIT") == kernel.get("ACQBULK") == 1, kernel
        assert kernel["before_wait"] == [], kernel
        assert kernel["stack"] == kernel.get("LDL", 0) == kernel.get("STL", 0) == 0, kernel


# ---- results


def _products(device: torch.device) -> list[Callable[[], Tensor]]:
    torch.manual_seed(5)
    x = torch.randn(3, 256, device=device).bfloat16()
    weight = torch.randn(64, 256, device=device).bfloat16()
    form = PanelFormat(bits=4)
    halves = torch.randint(0, 60, form.buffer_shape(64, 256), dtype=torch.uint8)  # whose scales are small numbers
    panels = Panels(halves.to(device), form, 64, 256)
    return [
        lambda: triton_matrix.launch(x, weight, None, torch.bfloat16, triton_matrix.TILES["32x16"]).values,
        lambda: triton_matrix.launch(x, weight, None, torch.bfloat16, triton_matrix.TILES["32x16"], "silu").values,
        lambda: triton_linear.launch(x, panels, None, torch.bfloat16, triton_linear.TILES["8x64/8 pairs"]),
        lambda: triton_norm.rms_norm(x, weight[0], 1e-5),
    ]


def test_results_are_the_same(device: torch.device) -> None:
    """Of kernels that prefetch. The interpreter, which knows neither, is only told."""
    for product in _products(device):
        expected = product()
        with Tuning(overlaps=device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)).used():
            assert torch.equal(product(), expected)


# ---- a GPU


def _chain(x: Tensor, weight: Tensor) -> Tensor:
    """Launches each of which needs what the one ahead of it has written, of one block and of many."""
    residual = x
    for _ in range(20):
        residual, y = triton_norm.add_rms_norm(x, residual, weight, 1e-5)
        x = triton_pointwise.gated_activation(torch.cat((y, residual), dim=-1), "silu")
        x = triton_pointwise.add(x, triton_norm.rms_norm(y, weight, 1e-5))
        x = triton_pointwise.add(x, y)
    return x


@needs_gpu
@pytest.mark.parametrize("rows", [1, 3, 3000])
def test_a_chain_of_kernels_keeps_its_order(rows: int, device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("needs compute capability 9.0")
    weight = torch.randn(4096, device=device).bfloat16()
    xs = [torch.randn(rows, 4096, device=device).bfloat16() for _ in range(8)]
    expected = [_chain(x, weight) for x in xs]
    with Tuning(overlaps=True).used():
        for x, y in zip(xs, expected, strict=True):
            assert torch.equal(_chain(x, weight), y)
        given = xs[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = _chain(given, weight)
    for _ in range(5):
        for x, y in zip(xs, expected, strict=True):
            given.copy_(x)
            graph.replay()
            assert torch.equal(result, y)
