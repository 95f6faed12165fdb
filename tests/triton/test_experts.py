"""Mixtral's experts: the kernels against the reference and float64, in all kinds of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna import ops
from puna.config import LLaMAConfig
from puna.distributed import NullCommunicator
from puna.layers import pieces
from puna.layers.mlp import GatedMLP
from puna.layers.moe import MoE
from puna.layers.pieces import Piece, PiecewiseModule
from puna.ops import reference, triton_experts
from puna.ops.panels import PanelFormat, Panels
from puna.ops.scaled import FP8, ScaledWeight
from puna.quantization import weight_format

EXPERTS, TOP, HIDDEN, INNER = 5, 2, 96, 160


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def matrices(count: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [numbers(outputs, inputs, dtype=dtype, device=device, seed=i, scale=inputs**-0.5) for i in range(count)]


def formatted(name: str, weights: list[Tensor], device: torch.device) -> list[Panels] | list[ScaledWeight]:
    """The weights as a WeightFormat holds them."""
    found: list[Any] = []
    for weight in weights:
        form = weight_format(name, torch.float32, *weight.shape)
        parameters = {key: value.detach() for key, value in form.create_parameters().items()}
        form.write(parameters, slice(0, weight.shape[0]), weight.float().cpu())
        parameters = {key: value.to(device) for key, value in parameters.items()}
        found.append(form.weight(parameters) if name.startswith("fp8") else form.panels(parameters))  # type: ignore[attr-defined]
    return found


def in_float64(x: Tensor, logits: Tensor, gate_up: list[Tensor], proj: list[Tensor], top: int) -> Tensor:
    """One token at a time."""
    probabilities = logits.double().softmax(-1)
    rows = []
    for token in range(x.shape[0]):
        best = probabilities[token].argsort(descending=True, stable=True)[:top]
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for expert in best.tolist():
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            inner = gate * gate.sigmoid() * up
            total += proj[expert].double() @ inner * (probabilities[token, expert] / probabilities[token, best].sum())
        rows.append(total)
    return torch.stack(rows)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "top"), [(1, 8, 2), (7, 5, 3), (70, 8, 2), (300, 4, 1)])
def test_route_experts(tokens: int, experts: int, top: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = numbers(tokens, experts, dtype=dtype, device=device)
    # Equal ones are for torch to choose in any order.
    logits = logits + torch.arange(experts, device=device) * (0.01 if dtype == torch.bfloat16 else 0.0)
    logits = logits.to(dtype)
    distinct = torch.tensor([len(set(row)) == experts for row in logits.tolist()], device=device)
    weights, indices = triton_experts.route_experts(logits, top)
    expected_weights, expected = reference.route_experts(logits, top)
    assert indices.dtype == torch.int64
    assert torch.equal(indices[distinct], expected[distinct])
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7)


def test_of_equal_experts_the_first_is_chosen(device: torch.device) -> None:
    weights, indices = triton_experts.route_experts(torch.zeros(2, 6, device=device), 3)
    assert indices.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3, device=device))


def test_nan_chooses_experts_that_exist(device: torch.device) -> None:
    logits = torch.full((3, 5), float("nan"), device=device)
    weights, indices = triton_experts.route_experts(logits, 2)
    assert int(indices.min()) >= 0
    assert int(indices.max()) < 5
    assert bool(weights.isnan().any())


@pytest.mark.parametrize(("tokens", "experts", "top"), [(1, 8, 2), (9, 5, 3), (64, 8, 2), (600, 3, 2)])
def test_pairs_are_sorted_by_expert(tokens: int, experts: int, top: int, device: torch.device) -> None:
    logits = numbers(tokens, experts, dtype=torch.float32, device=device)
    _, indices, groups = triton_experts._route(logits, top, torch.int32, sort=True)
    flat = indices.flatten()
    assert torch.equal(groups.order.long(), flat.argsort(stable=True))
    counts = torch.bincount(flat, minlength=experts)
    assert groups.starts.tolist() == [0, *counts.cumsum(0).tolist()]


@pytest.mark.parametrize("tokens", [1, 3, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_plain_weights(dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    gate_up = matrices(EXPERTS, 2 * INNER, HIDDEN, dtype, device)
    proj = matrices(EXPERTS, HIDDEN, INNER, dtype, device)
    x = numbers(tokens, HIDDEN, dtype=dtype, device=device)
    logits = numbers(tokens, EXPERTS, dtype=torch.float32, device=device, seed=3)
    found = triton_experts.experts(x, logits, gate_up, proj, TOP, "silu")
    assert found.dtype == dtype
    exact = in_float64(x, logits, gate_up, proj, TOP)
    expected = reference.experts(x, logits, gate_up, proj, TOP, "silu")
    assert relative(found, exact) < (2e-6 if dtype == torch.float32 else 1.2 * relative(expected, exact) + 1e-4)


@pytest.mark.parametrize("name", ["fp8", "fp8-block"])
@pytest.mark.parametrize("tokens", [1, 21])
def test_experts_in_fp8(name: str, tokens: int, device: torch.device) -> None:
    gate_up = formatted(name, matrices(EXPERTS, 2 * INNER, 256, torch.float32, device), device)
    proj = formatted(name, matrices(EXPERTS, 256, INNER, torch.float32, device), device)
    x = numbers(tokens, 256, dtype=torch.bfloat16, device=device)
    logits = numbers(tokens, EXPERTS, dtype=torch.bfloat16, device=device, seed=3)
    found = triton_experts.experts(x, logits, gate_up, proj, TOP, "silu")
    expected = reference.experts(x, logits, gate_up, proj, TOP, "silu")
    # Sums in another order round now and then to the other bfloat16, and that to the other e4m3.
    assert relative(found, expected) < 1e-2


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("int8", torch.float32),
        ("int8-16", torch.bfloat16),
        ("int8-min", torch.bfloat16),
        ("int4", torch.bfloat16),
        ("int4-16", torch.float32),
        ("int4-min-16", torch.float16),
    ],
)
def test_experts_in_panels(name: str, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = formatted(name, matrices(3, 128, HIDDEN, torch.float32, device), device)
    proj = formatted(name, matrices(3, HIDDEN, 64, torch.float32, device), device)
    assert all(isinstance(weight, Panels) for weight in gate_up)
    x = numbers(4, HIDDEN, dtype=dtype, device=device)
    logits = numbers(4, 3, dtype=dtype, device=device, seed=3)
    expected = reference.panel_experts(x, logits, gate_up, proj, TOP, "gelu")
    for tiles in (triton_experts._panel_tiles(logits, TOP), triton_experts._MANY_MIXED):
        found = triton_experts._experts(x, logits, gate_up, proj, TOP, "gelu", tiles)
        bound = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
        assert relative(found, expected) < bound, tiles


@pytest.mark.parametrize("kind", ["rows", "int4"])
def test_a_token_alone_has_the_bits_that_it_has_among_others(kind: str, device: torch.device) -> None:
    gate_up = matrices(EXPERTS, 2 * INNER, HIDDEN, torch.bfloat16, device)
    proj = matrices(EXPERTS, HIDDEN, INNER, torch.bfloat16, device)
    x = numbers(11, HIDDEN, dtype=torch.bfloat16, device=device)
    logits = numbers(11, EXPERTS, dtype=torch.bfloat16, device=device, seed=3)
    if kind == "rows":
        function: Callable[..., Tensor] = triton_experts.experts
        weights: tuple[Any, Any] = gate_up, proj
    else:
        function = triton_experts.panel_experts
        weights = formatted(kind, gate_up, device), formatted(kind, proj, device)
    together = function(x, logits, *weights, TOP, "silu", deterministic=True)
    for token in (0, 10):
        rows = slice(token, token + 1)
        alone = function(x[rows], logits[rows], *weights, TOP, "silu", deterministic=True)
        assert torch.equal(alone[0], together[token])


def test_all_tiles_agree(device: torch.device) -> None:
    gate_up = matrices(EXPERTS, 2 * INNER, HIDDEN, torch.float32, device)
    proj = matrices(EXPERTS, HIDDEN, INNER, torch.float32, device)
    x, logits = (numbers(20, n, dtype=torch.float32, device=device, seed=n) for n in (HIDDEN, EXPERTS))
    exact = in_float64(x, logits, gate_up, proj, TOP)
    for tiles in (triton_experts._FEW, triton_experts._SOME, triton_experts._MANY):
        assert relative(triton_experts._experts(x, logits, gate_up, proj, TOP, "silu", tiles), exact) < 2e-6


def test_experts_that_do_not_fit_are_refused(device: torch.device) -> None:
    x, logits = torch.empty(1, 32, device=device), torch.empty(1, 3, device=device)
    weights = [torch.empty(64, 32, device=device) for _ in range(2)]
    with pytest.raises(ValueError, match="2 and 2 weights for 3 experts"):
        triton_experts.experts(x, logits, weights, weights, 2, "silu")
    with pytest.raises(ValueError, match="experts_per_token is 4"):
        triton_experts.route_experts(logits, 4)


@pytest.mark.parametrize("quant", ["stored", "fp8", "fp8-block", "int4"])
def test_moe_gives_its_experts_to_one_op(quant: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLaMAConfig(
        architecture="MixtralForCausalLM",
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_size=16,
        hidden_size=64,
        mlp_hidden_size=128,
        vocab_size=64,
        max_position_embeddings=64,
        num_experts=3,
        experts_per_token=2,
        dtype="bfloat16",
        quant=quant,
    )
    monkeypatch.setattr(pieces, "dense_layout", lambda device: "rows")
    monkeypatch.setattr(ops, "backends_for", lambda device: (ops.TritonBackend(), ops.ReferenceBackend()))
    with torch.device(device):
        moe = MoE(config, NullCommunicator())
    for number, (_, piece) in enumerate(module_pieces(moe)):
        piece.write(numbers(*piece.full_shape, dtype=torch.float32, device=device, seed=number, scale=0.1))
    monkeypatch.setattr(moe, "_one_by_one", None)  # which asks the device how many rows an expert has
    x = numbers(2, 3, 64, dtype=torch.bfloat16, device=device)
    found = moe(x)
    tokens = x.flatten(0, 1)
    logits = moe.router(tokens)
    weights = [[layer(expert) for expert in moe.experts] for layer in (gate_up_of, proj_of)]
    expected = reference.experts(tokens, logits, weights[0], weights[1], 2, "silu")
    assert found.shape == x.shape
    # The reference rounds weights of int4 to bfloat16, and no inputs to FP8, of which three bits are left.
    bound = {"stored": 5e-3, "int4": 1e-2}.get(quant, 8e-2)
    assert relative(found.flatten(0, 1), expected) < bound


def module_pieces(moe: MoE) -> Iterator[tuple[str, Piece]]:
    for name, module in moe.named_modules():
        if isinstance(module, PiecewiseModule):
            for piece in module.pieces():
                yield f"{name}.{piece.name}", piece


def gate_up_of(expert: nn.Module) -> Tensor:
    assert isinstance(expert, GatedMLP)
    return torch.cat([piece.read() for piece in expert.gate_up.pieces()]).bfloat16()


def proj_of(expert: nn.Module) -> Tensor:
    assert isinstance(expert, GatedMLP)
    return expert.proj.pieces()[0].read().bfloat16()


def _compile(experts: list[Any], proj: list[Any]) -> None:
    """Mixtral 8x7B: decode steps of few and of some tokens, and a prompt."""
    for tokens in (2, 64, 4096):
        x, logits = (torch.empty(tokens, size, dtype=torch.bfloat16) for size in (4096, 8))
        if isinstance(experts[0], Panels):
            triton_experts.panel_experts(x, logits, experts, proj, 2, "silu")
        else:
            triton_experts.experts(x, logits, experts, proj, 2, "silu")


# The experts share memory, since only addresses matter.
SHAPES = ((2 * 14336, 4096), (4096, 14336))


def compile_rows() -> None:
    first, second = (torch.empty(shape, dtype=torch.bfloat16) for shape in SHAPES)
    _compile([first] * 8, [second] * 8)


def compile_fp8() -> None:
    first, second = (ScaledWeight(torch.empty(s, dtype=FP8), torch.empty(s[0], 1)) for s in SHAPES)
    _compile([first] * 8, [second] * 8)


def compile_fp8_blocks() -> None:
    first, second = (ScaledWeight(torch.empty(s, dtype=FP8), torch.empty(s[0] // 128, s[1] // 128)) for s in SHAPES)
    _compile([first] * 8, [second] * 8)


def compile_int4() -> None:
    form = PanelFormat(bits=4)
    first, second = (Panels(torch.empty(form.buffer_shape(*s), dtype=torch.uint8), form, *s) for s in SHAPES)
    _compile([first] * 8, [second] * 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "fp8", "fp8_blocks", "int4"])
def test_compiled_for_hopper(kind: str, compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper(f"test_experts.compile_{kind}")
    matmuls = [kernel for kernel in kernels if "group" in kernel["kernel"]]
    assert len(matmuls) == 6
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert not kernel.get("LDL"), kernel
        assert not kernel.get("STL"), kernel
    for kernel in matmuls:
        assert kernel["LDGSTS"] > 0, kernel
    # Hopper's own tensor cores where there are rows for them; two blocks a multiprocessor where there are not.
    own = "QGMMA" if kind.startswith("fp8") else "HGMMA"
    for kernel in matmuls[4:] if kind == "int4" else matmuls[2:]:
        assert kernel.get(own), kernel
    for kernel in matmuls[:2]:
        assert 2 * kernel["shared"] <= 227 * 1024, kernel
