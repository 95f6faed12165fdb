"""The reference ops against plain loops in numpy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.ops import OP_NAMES, OpSpec, choose, reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None, scale: float, window: int | None
) -> np.ndarray:
    """One sequence: query [H, S, D], key and value [K, L, D], mask [L] -> [H, S, D]; NaN where nothing is visible."""
    heads, queries, _ = query.shape
    length = key.shape[1]
    output = np.full_like(query, np.nan)
    for head in range(heads):
        kv_head = head * key.shape[0] // heads
        for i in range(queries):
            position = length - queries + i
            visible = [
                j
                for j in range(position + 1)
                if (window is None or position - j < window) and (mask is None or mask[j])
            ]
            if visible:
                scores = np.array([query[head, i] @ key[kv_head, j] * scale for j in visible])
                weights = np.exp(scores - scores.max())
                output[head, i] = (weights / weights.sum()) @ value[kv_head, visible]
    return output


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("queries", "length"), [(1, 1), (1, 9), (9, 9), (4, 9)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_attention(heads: int, kv_heads: int, queries: int, length: int, window: int | None, padded: bool) -> None:
    query, key, value = random(2, heads, queries, 8), random(2, kv_heads, length, 8), random(2, kv_heads, length, 8)
    mask = torch.ones(2, length, dtype=torch.bool)
    if padded:
        mask[0, : length // 2] = False
        mask[1, length - 1 :] = False
    found = reference.attention(query, key, value, mask if padded else None, 0.3, window)
    assert found.isfinite().all()
    for b in range(2):
        arrays = (part[b].double().numpy() for part in (query, key, value))
        expected = naive_attention(*arrays, mask[b].numpy(), 0.3, window)
        seen = ~np.isnan(expected)
        np.testing.assert_allclose(found[b].numpy()[seen], expected[seen], atol=2e-6)


def test_padding_gives_no_nan_gradients() -> None:
    query, key, value = (random(1, 2, 5, 4, seed=i).requires_grad_() for i in range(3))
    mask = torch.tensor([[False, False, True, True, True]])
    reference.attention(query, key, value, mask, 0.5, None)[:, :, 2:].sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("window", [None, 5])
def test_paged_attention_and_store_kv(window: int | None) -> None:
    """Sequences of which some tokens are cached already, in blocks in any order."""
    block_size, lengths, news = 4, [11, 1, 6, 8], [3, 1, 6, 1]
    key_cache, value_cache = torch.full((10, 2, block_size, 8), 7.0), torch.full((10, 2, block_size, 8), 7.0)
    tables = torch.tensor([[9, 2, 5], [0, 0, 0], [4, 1, 0], [3, 8, 0]], dtype=torch.int32)
    keys, values = [random(n, 2, 8, seed=n) for n in lengths], [random(n, 2, 8, seed=50 + n) for n in lengths]
    queries = [random(n, 4, 8, seed=90 + n) for n in news]
    for b, length in enumerate(lengths):
        slots = torch.tensor([int(tables[b, p // block_size]) * block_size + p % block_size for p in range(length)])
        reference.store_kv(keys[b], values[b], key_cache, value_cache, slots)
        assert torch.equal(key_cache[tables[b, (length - 1) // block_size], :, (length - 1) % block_size], keys[b][-1])
    assert (key_cache[[6, 7]] == 7).all()
    starts = torch.tensor([0, 3, 4, 10, 11], dtype=torch.int32)
    found = reference.paged_attention(
        torch.cat(queries), key_cache, value_cache, tables, starts, torch.tensor(lengths), 0.4, window
    )
    for b, rows in enumerate(found.split(news)):
        arrays = (part[b].double().transpose(0, 1).numpy() for part in (queries, keys, values))
        expected = naive_attention(*arrays, None, 0.4, window)
        np.testing.assert_allclose(rows.transpose(0, 1).numpy(), expected, atol=2e-6)


def test_rms_norm() -> None:
    x, weight = random(3, 5, 16), random(16, seed=1)
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * weight.double().numpy()
    np.testing.assert_allclose(reference.rms_norm(x, weight, 1e-3).numpy(), expected, atol=1e-6)


def test_rms_norm_of_bfloat16_takes_the_mean_in_float32() -> None:
    x = (random(4, 4096) * 30).bfloat16()
    weight = torch.ones(4096, dtype=torch.bfloat16)
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    found = reference.rms_norm(x, weight, 1e-6)
    assert found.dtype == torch.bfloat16
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2**-8)


def test_rotary_turns_pairs_by_their_angle() -> None:
    x, angles = random(7, 3, 8), random(7, 4, seed=1) * 3
    found = reference.rotary(x, angles.cos(), angles.sin()).double().numpy()
    pairs = x.double().numpy()[..., :4] + 1j * x.double().numpy()[..., 4:]
    turned = pairs * np.exp(1j * angles.double().numpy())[:, None, :]
    np.testing.assert_allclose(found, np.concatenate((turned.real, turned.imag), axis=-1), atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_gated_activation(activation: str) -> None:
    gate, up = random(6, 9).double().numpy(), random(6, 9, seed=1).double().numpy()
    functions = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        "gelu_pytorch_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: np.maximum(x, 0),
    }
    both = torch.cat((random(6, 9), random(6, 9, seed=1)), dim=-1)
    expected = functions[activation](gate) * up
    np.testing.assert_allclose(reference.gated_activation(both, activation).numpy(), expected, atol=1e-6)


def test_gated_activation_of_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="activation is 'swish'"):
        reference.gated_activation(random(2, 4), "swish")


def test_route_experts() -> None:
    router_logits = random(11, 6)
    weights, indices = reference.route_experts(router_logits, 3)
    wide = np.exp(router_logits.double().numpy())
    best = np.argsort(-wide, axis=-1)[:, :3]
    np.testing.assert_array_equal(indices.numpy(), best)
    chosen = np.take_along_axis(wide, best, axis=-1)
    np.testing.assert_allclose(weights.numpy(), chosen / chosen.sum(-1, keepdims=True), atol=1e-6)


def test_embedding_and_linear() -> None:
    weight, bias = random(5, 3), random(5, seed=1)
    assert torch.equal(reference.embedding(torch.tensor([[4, 0]]), weight), weight[torch.tensor([[4, 0]])])
    with pytest.raises(IndexError):
        reference.embedding(torch.tensor([5]), weight)
    x = random(2, 3, seed=2)
    expected = x.double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    np.testing.assert_allclose(reference.linear(x, weight, bias, torch.float32).numpy(), expected, atol=1e-6)


def test_a_wider_result_of_linear_is_the_models_widened() -> None:
    """As transformers has logits: a 16-bit product, then in float32."""
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(7, 40).bfloat16()
    product = torch.nn.functional.linear(x, weight)
    assert torch.equal(reference.linear(x, weight, None, torch.bfloat16), product)
    assert torch.equal(reference.linear(x, weight, None, torch.float32), product.float())


def test_gated_linear() -> None:
    x, weight, bias = torch.randn(3, 40), torch.randn(14, 40), torch.randn(14)
    wide = x.double() @ weight.double().T + bias.double()
    expected = wide[:, :7] * torch.sigmoid(wide[:, :7]) * wide[:, 7:]
    found = reference.gated_linear(x, weight, bias, "silu")
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4, rtol=1e-5)


SPEC = OpSpec(device=torch.device("cpu"), dtype=torch.float32, head_size=8)


def test_the_reference_serves_every_op() -> None:
    table, choices = choose(SPEC)
    assert tuple(choice.op for choice in choices) == OP_NAMES
    assert {choice.backend for choice in choices} == {"reference"}
    assert table.rms_norm is reference.rms_norm


class _OnlyNorms:
    """A backend that has one op and says why it lacks the others."""

    name = "norms"

    def function(self, op: str, spec: OpSpec) -> object:
        return (lambda x, weight, epsilon: x) if op == "rms_norm" else f"no {op} for heads of {spec.head_size}"


class _Everything:
    name = "everything"

    def function(self, op: str, spec: OpSpec) -> object:
        return getattr(reference, op)


def test_the_first_backend_that_supports_an_op_serves_it_and_refusals_are_reported() -> None:
    table, choices = choose(SPEC, (_OnlyNorms(), _Everything()))
    by_op = {choice.op: choice for choice in choices}
    assert by_op["rms_norm"].backend == "norms"
    assert table.rms_norm is not reference.rms_norm
    assert by_op["linear"].backend == "everything"
    assert by_op["linear"].refusals == ("norms: no linear for heads of 8",)


def test_an_op_that_nobody_supports_is_an_error_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"no backend supports embedding .* no embedding for heads of 8"):
        choose(SPEC, (_OnlyNorms(),))
