"""Wrong calls of the compiled kernels: an exception, never a crash, and never another result than the reference's.

The calls are made by fuzz_child.py. What reads or writes too far is seen for certain under `make sanitize` only.
"""

from __future__ import annotations

import copy
from typing import Any, Final, Protocol

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.ops import OP_NAMES, CompiledBackend, OpSpec

pytest.importorskip("puna._kernels", reason="the compiled module is not built here")

Call = dict[str, Any]


class Child(Protocol):
    """conftest.py's fixture `child`."""

    def outcome(self, call: Call) -> str: ...


REFUSALS: Final = frozenset(
    ["ValueError", "TypeError", "IndexError", "OverflowError", "RuntimeError", "AttributeError", "NotImplementedError"]
)


def tensor(*shape: int, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    return {"tensor": {"shape": list(shape), "dtype": dtype, **more}}


def panels(outputs: int, inputs: int, form: dict[str, Any]) -> dict[str, Any]:
    return {"panels": {"outputs": outputs, "inputs": inputs, **form}}


FLOATS: Final = ("float32", "bfloat16", "float16")
FORMS: Final = (
    *({"dtype": dtype, "bits": 0} for dtype in FLOATS),
    *(
        {"bits": bits, "group_size": size, "minimums": low}
        for bits in (4, 8)
        for size in (16, 32)
        for low in (False, True)
    ),
)
few: Final = st.integers(1, 5)
floats: Final = st.sampled_from(FLOATS)
forms: Final = st.sampled_from(FORMS)
activations: Final = st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])
widths: Final = st.sampled_from([1, 2, 16, 31, 32, 33, 64, 100, 130])
BLOCK_SIZE: Final = 16


FUNCTIONS: Final = (
    "embedding", "panel_embedding", "panel_linear", "panel_gated_linear", "add", "rms_norm", "add_rms_norm", "rotary",
    "gated_activation", "store_kv", "paged_attention", "panel_experts",
)  # fmt: skip


@st.composite
def right_calls(draw: st.DrawFn, function: str) -> Call:
    """Calls of a function of puna.ops.cpu that are all right."""
    tokens, width, dtype, form = draw(few), draw(widths), draw(floats), draw(forms)
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]))
    size = draw(st.sampled_from([2, 16, 30, 64]))
    activation = draw(activations)
    vocabulary, outputs = draw(st.sampled_from([1, 40, 70])), draw(st.sampled_from([2, 64, 66, 128]))
    x = tensor(tokens, width, dtype=dtype)
    ids = tensor(tokens, dtype="int64", values=[0, vocabulary - 1])
    cache = tensor(3, kv_heads, BLOCK_SIZE, size, dtype=dtype)
    experts = 3
    part = 32
    calls: dict[str, dict[str, Any]] = {
        "embedding": {"token_ids": ids, "weight": tensor(vocabulary, width, dtype=dtype)},
        "panel_embedding": {"token_ids": ids, "panels": panels(vocabulary, width, form), "dtype": {"dtype": dtype}},
        "panel_linear": {
            "x": x,
            "panels": panels(outputs, width, form),
            "bias": draw(st.sampled_from([None, tensor(outputs, dtype=dtype)])),
            "dtype": {"dtype": dtype},
        },
        "panel_gated_linear": {
            "x": x,
            "panels": panels(outputs, width, form),
            "bias": draw(st.sampled_from([None, tensor(outputs, dtype=dtype)])),
            "activation": activation,
        },
        "add": {"a": x, "b": x},
        "rms_norm": {
            "x": draw(st.sampled_from([x, tensor(tokens, heads, width, dtype=dtype)])),
            "weight": tensor(width, dtype=dtype),
            "epsilon": 1e-5,
        },
        "add_rms_norm": {"x": x, "residual": x, "weight": tensor(width, dtype=dtype), "epsilon": 1e-5},
        "rotary": {
            "x": tensor(tokens, heads, size, dtype=dtype),
            "cos": tensor(tokens, size // 2),
            "sin": tensor(tokens, size // 2),
        },
        "gated_activation": {"gate_up": tensor(tokens, 2 * width, dtype=dtype), "activation": activation},
        "store_kv": {
            "key": tensor(tokens, kv_heads, size, dtype=dtype),
            "value": tensor(tokens, kv_heads, size, dtype=dtype),
            "key_cache": cache,
            "value_cache": cache,
            "slot_mapping": tensor(tokens, dtype="int64", values=[5, 0, 3 * BLOCK_SIZE - 1, 17, 30]),
        },
        "paged_attention": {
            "query": tensor(tokens, heads, size, dtype=dtype),
            "key_cache": cache,
            "value_cache": cache,
            "block_tables": tensor(2, 2, dtype="int32", values=[2, 1, 0, 1]),
            "query_starts": tensor(3, dtype="int32", values=[0, 1, tokens + 1]),
            "sequence_lengths": tensor(2, dtype="int32", values=[20, 30]),
            "scale": 0.3,
            "sliding_window": draw(st.sampled_from([None, 7])),
        },
        "panel_experts": {
            "x": x,
            "router_logits": tensor(tokens, experts, dtype=dtype),
            "gate_up": [panels(2 * part, width, form)] * experts,
            "proj": [panels(width, part, form)] * experts,
            "experts_per_token": 2,
            "activation": activation,
        },
    }
    calls["paged_attention"]["query"]["tensor"]["shape"][0] = tokens + 1
    return {"raw": False, "function": function, "arguments": copy.deepcopy(calls[function])}


DTYPES: Final = (*FLOATS, "float64", "int8", "uint8", "int32", "int64", "bool", "complex64")
LAYOUTS: Final = (
    "misaligned", "expanded", "expanded last", "transposed", "last first", "every second", "wide rows"
)  # fmt: skip
EXTREMES: Final = (-1, -(2**31), -(2**63), 2**31 - 1, 2**31, 2**40, 2**62)


def spoil_tensor(draw: st.DrawFn, spec: dict[str, Any]) -> None:
    kind = draw(st.sampled_from(["dtype", "layout", "layout", "layout", "axis", "size", "size", "device", "values"]))
    shape = spec["shape"]
    if kind == "dtype":
        spec["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "layout":
        spec["layout"] = draw(st.sampled_from(LAYOUTS))
    elif kind == "axis":
        spec["shape"] = draw(st.sampled_from([[1, *shape], [*shape, 1], shape[1:], shape[:-1], []]))
    elif kind == "size" and shape:
        axis = draw(st.integers(0, len(shape) - 1))
        shape[axis] = draw(st.sampled_from([0, 1, 2, max(shape[axis] - 1, 0), shape[axis] + 1, 2 * shape[axis], 257]))
    elif kind == "device":
        spec["device"] = "meta"
    # Where tokens and lengths begin is the caller's word: only ids, slots and blocks are looked at.
    elif kind == "values" and spec["dtype"] in ("int64", "int32") and not spec.get("trusted"):
        highest = 2**63 if spec["dtype"] == "int64" else 2**31
        spec["values"] = [n for n in draw(st.lists(st.sampled_from(EXTREMES), min_size=1)) if -highest <= n < highest]


def spoil_panels(draw: st.DrawFn, spec: dict[str, Any]) -> None:
    kind = draw(st.sampled_from(["data", "off", "outputs", "inputs", "form"]))
    if kind == "data":
        inner = {"shape": [1, 1088], "dtype": "uint8"}
        spoil_tensor(draw, inner)
        spec["data"] = inner
    elif kind == "off":
        spec["data"] = {"off": draw(st.sampled_from([1, 2, 16, 32]))}
    elif kind == "form":
        for key in ("dtype", "bits", "group_size", "minimums"):
            spec.pop(key, None)
        spec.update(draw(forms))
    else:
        spec[kind] = draw(st.sampled_from([0, 1, max(spec[kind] - 1, 0), spec[kind] + 1, 2 * spec[kind]]))


@st.composite
def wrong_calls(draw: st.DrawFn, function: str) -> Call:
    """Right calls of which one or two arguments were changed."""
    call = draw(right_calls(function))
    arguments = call["arguments"]
    for name in ("query_starts", "sequence_lengths"):
        if name in arguments:
            arguments[name]["tensor"]["trusted"] = True
    for name in draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        value = arguments[name]
        if isinstance(value, list) and draw(st.booleans()):
            arguments[name] = draw(st.sampled_from([[], value[:1], [*value, value[0]]]))
            continue
        target = value[draw(st.integers(0, len(value) - 1))] if isinstance(value, list) else value
        if isinstance(target, dict) and "tensor" in target and draw(st.integers(0, 9)):
            spoil_tensor(draw, target["tensor"])
        elif isinstance(target, dict) and "panels" in target and draw(st.integers(0, 9)):
            spoil_panels(draw, target["panels"])
        else:
            other = [None, "silu", "?", 0, -1, 2, 2**40, 0.5, [], {"float": "nan"}, {"dtype": "int8"}, tensor(2, 2)]
            arguments[name] = draw(st.sampled_from(other))
    return call


fuzzed = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
each_function = pytest.mark.parametrize("function", FUNCTIONS)


def test_every_op_is_here() -> None:
    spec = OpSpec(device=torch.device("cpu"), dtype=torch.float32, head_size=64, differentiable=False)
    ops = {op for op in OP_NAMES if callable(CompiledBackend().function(op, spec))}
    # rotate_and_store is rotary, twice, and store_kv.
    assert ops - {"rotate_and_store"} | {"store_kv"} == set(FUNCTIONS)


@each_function
@settings(fuzzed, max_examples=15)
@given(data=st.data())
def test_right_calls_give_the_references_results(child: Child, function: str, data: st.DataObject) -> None:
    assert child.outcome(data.draw(right_calls(function))) == "ok"


TINY: Final = {"bits": 8}


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("rms_norm", {"x": tensor(4, 2, 33, layout="expanded"), "weight": tensor(33), "epsilon": 1e-5}),
        ("rms_norm", {"x": tensor(4, 2, 33, layout="transposed"), "weight": tensor(33), "epsilon": 1e-5}),
        ("embedding", {"token_ids": tensor(3, dtype="int32", values=[2]), "weight": tensor(5, 9, layout="wide rows")}),
        ("add", {"a": tensor(40, 30, layout="expanded"), "b": tensor(40, 30, layout="last first")}),
    ],
)
def test_memory_in_any_order_is_read_right(child: Child, function: str, arguments: dict[str, Any]) -> None:
    assert child.outcome({"raw": False, "function": function, "arguments": arguments}) == "ok"


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("gated_activation", {"gate_up": tensor(2, 33), "activation": "silu"}),
        (
            "panel_experts",
            {
                "x": tensor(2, 64),
                "router_logits": tensor(2, 2),
                "gate_up": [panels(64, 64, TINY)] * 2,
                "proj": [panels(64, 96, TINY)] * 2,  # three times as many inputs as gates
                "experts_per_token": 1,
                "activation": "silu",
            },
        ),
        (
            "paged_attention",
            {
                "query": tensor(2, 2, 16),
                "key_cache": tensor(3, 1, BLOCK_SIZE, 16),
                "value_cache": tensor(3, 1, BLOCK_SIZE, 16),
                "block_tables": tensor(2, 2, dtype="int32", values=[2, 1, 0, 1]),
                "query_starts": tensor(3, dtype="int32", values=[0, 1, 3]),  # a third token
                "sequence_lengths": tensor(2, dtype="int32", values=[20, 30]),
                "scale": 0.3,
                "sliding_window": None,
            },
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(child: Child, function: str, arguments: dict[str, Any]) -> None:
    assert child.outcome({"raw": False, "function": function, "arguments": arguments}) == "ValueError"


@each_function
@settings(fuzzed, max_examples=60)
@given(data=st.data())
def test_wrong_calls_are_refused_or_harmless(child: Child, function: str, data: st.DataObject) -> None:
    answer = child.outcome(data.draw(wrong_calls(function)))
    assert answer == "ok" or answer in REFUSALS
