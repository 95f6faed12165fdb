"""The module puna._kernels itself: every argument of every function, wrong in every way that a function can see."""

from __future__ import annotations

from typing import Any, Final, Protocol

import pytest

kernels = pytest.importorskip("puna._kernels", reason="the compiled module is not built here")

Call = dict[str, Any]


class Child(Protocol):
    """conftest.py's fixture `child`."""

    def outcome(self, call: Call) -> str: ...


# An address of so many zeros, on a 64-byte boundary. `optional`: may be null.
Address = dict[str, dict[str, Any]]
MEMORY: Final[Address] = {"address": {"bytes": 1 << 16}}
OPTIONAL: Final[Address] = {"address": {"bytes": 1 << 16, "optional": True}}

_PANELS: Final = {"dense": 0, "bits": 8, "groups": 1, "minimums": 0}
_CACHE: Final = {
    "keys": MEMORY, "values": MEMORY, "blocks": 2, "kv_heads": 1, "block_size": 16, "head_size": 16, "cache_dtype": 0
}  # fmt: skip

RIGHT: Final[dict[str, dict[str, Any]]] = {
    "linear": {
        "x": MEMORY, "weight": MEMORY, "bias": OPTIONAL, "y": MEMORY, "x_stride": 64, "y_stride": 64, "rows": 2,
        "inputs": 64, "outputs": 64, **_PANELS, "x_dtype": 0, "y_dtype": 0, "activation": 0, "gated": False,
    },
    "embedding": {
        "ids": MEMORY, "table": MEMORY, "y": MEMORY, "rows": 2, "vocabulary": 32, "inputs": 64, "table_stride": 64,
        "is_panels": False, **_PANELS, "y_dtype": 0,
    },
    "rms_norm": {
        "x": MEMORY, "residual": 0, "weight": MEMORY, "sum": 0, "y": MEMORY, "outer": 2, "inner": 1, "size": 64,
        "x_outer_stride": 64, "x_inner_stride": 0, "epsilon": 1e-5, "dtype": 0,
    },
    "add": {"a": MEMORY, "b": MEMORY, "y": MEMORY, "count": 64, "dtype": 0},
    "gated_activation": {"gate_up": MEMORY, "y": MEMORY, "rows": 2, "size": 64, "activation": 1, "dtype": 0},
    "rotary": {
        "x": MEMORY, "cos": MEMORY, "sin": MEMORY, "y": MEMORY, "tokens": 2, "heads": 2, "head_size": 16,
        "x_stride": 32, "angle_stride": 8, "dtype": 0,
    },
    "store_kv": {
        "key": MEMORY, "value": MEMORY, "slots": MEMORY, "tokens": 2, "key_stride": 16, "value_stride": 16, "dtype": 0,
        **_CACHE,
    },
    "paged_attention": {
        "query": MEMORY, "y": MEMORY, "block_tables": MEMORY, "query_starts": MEMORY, "sequence_lengths": MEMORY,
        "sequences": 1, "heads": 2, "query_stride": 32, "table_stride": 2, "table_width": 2, "window": 0, "scale": 0.5,
        "dtype": 0, **_CACHE,
    },
    "round_groups": {
        "rows": MEMORY, "panels": MEMORY, "first": 0, "count": 2, "inputs": 64, "stride": 64, "bits": 4, "dtype": 0
    },
    "argmax": {"x": MEMORY, "indices": MEMORY, "values": MEMORY, "rows": 2, "size": 64, "x_stride": 64},
    "draw": {
        "x": MEMORY, "temperature": MEMORY, "top_k": OPTIONAL, "top_p": OPTIONAL, "min_p": OPTIONAL, "uniform": MEMORY,
        "tokens": MEMORY, "highest": MEMORY, "rows": 2, "size": 64, "x_stride": 64,
    },
    "probe": {"kind": 0, "memory": MEMORY, "bytes": 4096, "iterations": 3, "operations": MEMORY},
    "set_threads": {"count": 2},
    "set_level": {"level": "portable"},
    "set_bf16_dots": {"uses": False},
}  # fmt: skip

# Without arguments, or (experts) with addresses of addresses: test_fuzz.py calls it through puna.ops.cpu.
ELSEWHERE: Final = frozenset(
    ["cpu_features", "supported_levels", "level", "threads", "bf16_dots", "experts", "Recording"]
)

NO_NUMBER: Final = ("?", None, 0.5, [], -(2**63) - 1, 2**64)
# Numbers that name one of a few things.
CHOICES: Final = frozenset(
    ["dense", "bits", "groups", "x_dtype", "y_dtype", "dtype", "cache_dtype", "activation", "kind", "group_size"]
)
# Flags and sizes of which large ones are right.
ANY_INTEGER: Final = frozenset(["minimums", "iterations", "bytes"])


def wrong_values(name: str, value: Any) -> list[Any]:
    if isinstance(value, dict):
        inner = value["address"]
        wrong: list[Any] = ["?", None, 0.5, [], -1, 2**64]
        if not inner.get("optional"):
            wrong.append(0)
        return [*wrong, {"address": {**inner, "off": 1}}]
    if isinstance(value, bool):
        return ["?", None, 0.5, 2]
    if isinstance(value, float):
        return ["?", None, []]
    if isinstance(value, str):
        return ["", "avx1024", 3, None]
    if name in ("residual", "sum"):
        return ["?", None, 0.5, -1, 2**64, MEMORY]  # one without the other
    if name in ANY_INTEGER:
        return [*NO_NUMBER, *([] if name == "minimums" else [-1])]
    return [*NO_NUMBER, -1, -(2**31), -(2**63), *([99, 5] if name in CHOICES else [2**31, 2**62])]


def test_every_function_is_here() -> None:
    public = {name for name in dir(kernels) if not name.startswith("_")}
    assert public == RIGHT.keys() | ELSEWHERE


@pytest.mark.parametrize("function", RIGHT)
def test_every_wrong_argument_is_refused(child: Child, function: str) -> None:
    right = RIGHT[function]

    def outcome(**changed: Any) -> str:
        return child.outcome({"raw": True, "function": function, "arguments": {**right, **changed}})

    assert outcome() == "ok"
    for name, value in right.items():
        for wrong in wrong_values(name, value):
            assert outcome(**{name: wrong}) in ("ValueError", "TypeError"), (name, wrong)
        missing = {key: kept for key, kept in right.items() if key != name}
        assert child.outcome({"raw": True, "function": function, "arguments": missing}) == "TypeError"
    assert outcome(another=1) == "TypeError"


@pytest.mark.parametrize(
    ("function", "changed"),
    [
        ("linear", {"x_stride": 63}),
        ("linear", {"y_stride": 63}),
        ("linear", {"gated": True, "outputs": 33, "y_stride": 33}),
        ("argmax", {"x_stride": 63}),
        ("draw", {"x_stride": 63}),
        ("draw", {"size": 2**24 + 1, "x_stride": 2**24 + 1}),
        ("argmax", {"size": 2**24 + 1, "x_stride": 2**24 + 1}),
        ("embedding", {"table_stride": 63}),
        ("embedding", {"is_panels": True, "table": {"address": {"bytes": 1 << 16, "off": 32}}}),
        ("rms_norm", {"x_outer_stride": 63}),
        ("rms_norm", {"residual": MEMORY, "sum": MEMORY, "inner": 2, "x_inner_stride": 64}),
        ("rotary", {"head_size": 15}),
        ("rotary", {"x_stride": 31}),
        ("rotary", {"angle_stride": 7}),
        ("store_kv", {"block_size": 24}),
        ("store_kv", {"head_size": 258, "key_stride": 258, "value_stride": 258}),
        ("store_kv", {"key_stride": 15}),
        ("paged_attention", {"kv_heads": 3}),
        ("paged_attention", {"query_stride": 31}),
        ("paged_attention", {"table_stride": 1}),
        ("set_threads", {"count": 0}),
        ("set_threads", {"count": 1025}),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(child: Child, function: str, changed: dict[str, Any]) -> None:
    assert (
        child.outcome({"raw": True, "function": function, "arguments": {**RIGHT[function], **changed}}) == "ValueError"
    )


@pytest.mark.parametrize("size", ["rows", "outer", "count", "tokens", "sequences"])
def test_nothing_to_do_needs_no_memory(child: Child, size: str) -> None:
    for function, right in RIGHT.items():
        if isinstance(right.get(size), int) and function != "set_threads":
            own = {name: 0 if isinstance(value, dict) else value for name, value in right.items()}
            own.update({name: MEMORY for name in ("keys", "values") if name in right})
            assert child.outcome({"raw": True, "function": function, "arguments": {**own, size: 0}}) == "ok", function


@pytest.mark.parametrize(
    "code",
    [
        "r.begin(); r.begin()",
        "r.begin(); other.begin()",
        "r.begin(); r.end(); r.begin()",
        "r.begin(); r.replay()",
    ],
)
def test_recordings_out_of_order_are_refused_or_harmless(child: Child, code: str) -> None:
    assert child.outcome({"code": code}) in ("ok", "RuntimeError")


def test_a_recording_that_is_given_up_does_not_take_the_next_call(child: Child) -> None:
    assert child.outcome({"code": "r.begin(); del r; work()"}) == "ok"
