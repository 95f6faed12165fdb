"""Mixtral's experts: against float64, ties of the router, and the bits of a token over batches and threads."""

from __future__ import annotations

from types import ModuleType
from typing import Final, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops import cpu
from puna.ops.panels import PanelFormat, Panels
from puna.quantization.panels import DensePanels, GroupPanels

# The hidden size fills no panel and no block of 32; the inner size must be a multiple of 32, as that of gated layers.
HIDDEN: Final = 72
INNER: Final = 96


class Format(NamedTuple):
    panels: PanelFormat
    dtype: torch.dtype  # of x
    tolerance: float  # of the largest output: int8 rows lose 1/254 of their largest number, bfloat16 1/256 of each


FORMATS: Final = {
    "float32": Format(PanelFormat(torch.float32), torch.float32, 2e-6),
    "bfloat16": Format(PanelFormat(torch.bfloat16), torch.bfloat16, 1e-2),
    "float16": Format(PanelFormat(torch.float16), torch.float16, 1.5e-3),
    "int8": Format(PanelFormat(bits=8), torch.bfloat16, 4e-2),
    "int4": Format(PanelFormat(bits=4), torch.float32, 4e-2),
}
each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(form: PanelFormat, weight: Tensor) -> Panels:
    outputs, inputs = weight.shape
    if form.bits:
        stored: DensePanels | GroupPanels = GroupPanels("groups", form, outputs, inputs)
    else:
        assert form.dtype is not None
        stored = DensePanels(form.dtype, outputs, inputs)
    parameters = stored.create_parameters()
    stored.write(parameters, slice(0, outputs), weight)
    return stored.panels(parameters)


class Experts(NamedTuple):
    gate_up: list[Panels]
    proj: list[Panels]


def make_experts(form: PanelFormat, count: int) -> Experts:
    return Experts(
        [packed(form, random(2 * INNER, HIDDEN, seed=i) / 8) for i in range(count)],
        [packed(form, random(HIDDEN, INNER, seed=100 + i) / 8) for i in range(count)],
    )


def exact_experts(x: Tensor, logits: Tensor, experts: Experts, top: int) -> Tensor:
    """In float64; among experts that the router likes equally, those with the lower indices."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, indices = order.values[:, :top], order.indices[:, :top]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, index in zip(weights[token], indices[token], strict=True):
            first, second = experts.gate_up[index], experts.proj[index]
            gate, up = (first.dequantize(0, first.outputs).double() @ x[token].double()).chunk(2)
            y[token] += weight * (second.dequantize(0, second.outputs).double() @ (F.silu(gate) * up))
    return y


def run(x: Tensor, logits: Tensor, experts: Experts, top: int) -> Tensor:
    return cpu.panel_experts(x, logits, experts.gate_up, experts.proj, top, "silu")


@each_format
@pytest.mark.parametrize(("count", "top"), [(8, 2), (1, 1), (3, 3), (20, 4)])
def test_against_float64(kernels: ModuleType, level: str, form: Format, count: int, top: int) -> None:
    kernels.set_threads(2)
    experts = make_experts(form.panels, count)
    for tokens in (1, 2, 19):
        x = random(tokens, HIDDEN, dtype=form.dtype, seed=tokens)
        logits = random(tokens, count, dtype=form.dtype, seed=tokens + 1)
        y = run(x, logits, experts, top)
        exact = exact_experts(x, logits, experts, top)
        assert y.dtype == form.dtype
        assert (y.double() - exact).abs().amax() <= form.tolerance * exact.abs().amax(), tokens


@each_format
def test_bits_of_a_token_do_not_depend_on_the_others_or_threads(kernels: ModuleType, level: str, form: Format) -> None:
    experts = make_experts(form.panels, 5)
    # Past one block of tokens, where the level is not slow.
    tokens = 60 if level == "portable" else 530
    x = random(tokens, HIDDEN, dtype=form.dtype, seed=1)
    logits = random(tokens, 5, dtype=form.dtype, seed=2)
    kernels.set_threads(1)
    together = run(x, logits, experts, 2)
    assert together.isfinite().all()
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        assert torch.equal(run(x, logits, experts, 2), together), threads
        for first, last in ((0, 1), (1, 2), (2, 9), (9, 50), (tokens - 1, tokens)):
            part = run(x[first:last], logits[first:last], experts, 2)
            assert torch.equal(part, together[first:last]), (threads, first)


def test_of_equal_logits_the_lower_indices_are_chosen(kernels: ModuleType, level: str) -> None:
    experts = make_experts(FORMATS["float32"].panels, 6)
    x = random(3, HIDDEN)
    logits = torch.tensor([[0.0, 0, 0, 0, 0, 0], [1, 2, 2, 1, 2, 2], [5, -5, 5, 7, 5, 5]])
    y = run(x, logits, experts, 2)
    for token, pair in enumerate(((0, 1), (1, 2), (3, 0))):
        only = torch.full((1, 6), -80.0)
        only[0, list(pair)] = logits[token, list(pair)]
        assert torch.allclose(y[token], run(x[token : token + 1], only, experts, 2)[0], rtol=1e-5, atol=1e-6)


def test_extreme_logits(kernels: ModuleType, level: str) -> None:
    experts = make_experts(FORMATS["float32"].panels, 3)
    x = random(4, HIDDEN)
    logits = torch.tensor([[3e38, -3e38, 0.0], [float("-inf"), 2, 1], [float("nan"), 0, 1], [1, 2, 3]])
    y = run(x, logits, experts, 2)
    exact = exact_experts(x[[0, 1, 3]], logits[[0, 1, 3]], experts, 2)
    assert torch.allclose(y[[0, 1, 3]].double(), exact, rtol=1e-5, atol=1e-5)
    assert y[2].isnan().all()
