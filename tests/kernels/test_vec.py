"""The vectors under the kernels: every wrapper against numpy, and the same bits at every level.

The program csrc/tests/vec_tests.cpp runs the wrappers; it is built here, by the compiler that built the module.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

ROOT: Final = Path(__file__).resolve().parent.parent.parent
Array = NDArray[Any]
Outputs = dict[str, bytes]

# vdpbf16ps of AVX-512 rounds in its own way.
PROCESSOR_ROUNDS: Final = "dot_pairs"
NAN_VARIES: Final = frozenset(["add", "subtract", "multiply", "divide", "fma", "sum", "exp", "round", "dot_pairs"])


def cmake() -> str:
    """The cmake of this environment, or any; the test is skipped where there is none."""
    beside = Path(sys.executable).parent / "cmake"
    found = str(beside) if beside.exists() else shutil.which("cmake")
    if found is None:
        pytest.skip("no cmake to build the vectors' test program with")
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vec_tests")
    for command in (
        [cmake(), "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"],
        [cmake(), "--build", str(folder), "--target", "vec_tests"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "vec_tests"


def interesting_numbers() -> Array:
    """Float32: every kind of number, where conversions round to even, the range of exp, and random bits."""
    generator = np.random.default_rng(0)
    special = [0.0, 1.0, 0.5, 1.5, 2.5, 1e-45, 1.1754942e-38, 1.17549435e-38, 3.4028235e38, np.inf, 65504.0, 65519.996]
    special += [
        65520.0,
        65536.0,
        2.0**-24,
        2.0**-25,
        2.0**-26,
        6.0975552e-5,
        6.1035156e-5,
        2.0**31,
        2.0**31 - 128,
        88.4,
    ]
    numbers = np.array(special, np.float32)
    nan = np.array([0x7FC00000, 0x7F800001, 0x7FBFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    # The middle of each float16 and the next one, and the float32 numbers beside the middle; of bfloat16 every seventh.
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    middles = np.append(middles, (np.arange(0, 0x7F80, 7, dtype=np.uint32) << 16 | 0x8000).view(np.float32))
    beside = [np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))]
    numbers = np.concatenate([numbers, nan, middles, *beside])
    numbers = np.concatenate([numbers, -numbers, np.linspace(-90, 90, 40000, dtype=np.float32)])
    bits = generator.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([numbers, bits])
    return np.resize(numbers, -(-numbers.size // 64) * 64)


@pytest.fixture(scope="module")
def inputs() -> Array:
    """x, y and z [3, n]: y and z are x in other orders, and bytes that are extreme in x meet extreme ones in y."""
    x = interesting_numbers()
    generator = np.random.default_rng(1)
    y, z = generator.permutation(x), generator.permutation(x)
    raw_x, raw_y = x.view(np.uint8), y.view(np.uint8)
    raw_x[-256:], raw_y[-256:-128], raw_y[-128:] = 255, 0x80, 0x7F
    return np.stack([x, y, z])


@pytest.fixture(scope="module")
def outputs(program: Path, inputs: Array, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outputs]:
    """For each level of this processor, each wrapper's results."""
    kernels = pytest.importorskip("puna._kernels", reason="the compiled module is not built here")
    folder = tmp_path_factory.mktemp("vec_outputs")
    inputs.tofile(folder / "inputs")
    found: dict[str, Outputs] = {}
    for level in kernels.supported_levels():
        subprocess.run([program, level, folder / "inputs", folder / level], check=True)
        found[level], raw, at = {}, (folder / level).read_bytes(), 0
        while at < len(raw):
            name = raw[at : at + 32].rstrip(b"\0").decode()
            length = int.from_bytes(raw[at + 32 : at + 40], "little")
            found[level][name] = raw[at + 40 : at + 40 + length]
            at += 40 + length
    return found


@pytest.fixture(params=["portable", "avx2", "avx2vnni", "avx512"])
def results(request: pytest.FixtureRequest, outputs: dict[str, Outputs]) -> Outputs:
    if request.param not in outputs:
        pytest.skip(f"this processor has no {request.param}")
    return outputs[request.param]


def floats(results: Outputs, name: str) -> Array:
    return np.frombuffer(results[name], np.float32)


def integers(results: Outputs, name: str) -> Array:
    return np.frombuffer(results[name], np.int32)


def assert_same_bits(got: Array, expected: Array) -> None:
    """Equal in every bit, but for which NaN it is."""
    assert got.dtype == expected.dtype
    different = (got.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(got) & np.isnan(expected))
    assert not different.any(), (np.flatnonzero(different)[:5], got[different][:5], expected[different][:5])


def test_all_levels_give_the_same_bits(outputs: dict[str, Outputs]) -> None:
    portable = outputs["portable"]
    for level, results in outputs.items():
        assert results.keys() == portable.keys()
        for name, expected in portable.items():
            if level == "avx512" and name == PROCESSOR_ROUNDS:
                continue
            if results[name] != expected:
                # Which NaN comes out of arithmetic is the processor's and the compiler's choice; not of conversions.
                assert name in NAN_VARIES, (level, name)
                assert_same_bits(floats(results, name), floats(portable, name))


ARITHMETIC: Final[dict[str, Callable[[Array, Array, Array], Array]]] = {
    "add": lambda x, y, z: x + y,
    "subtract": lambda x, y, z: x - y,
    "multiply": lambda x, y, z: x * y,
    "divide": lambda x, y, z: x / y,
    "max": lambda x, y, z: np.where(x > y, x, y),
    "min": lambda x, y, z: np.where(x < y, x, y),
    "where_greater": lambda x, y, z: np.where(x > y, z, x),
    "abs": lambda x, y, z: np.abs(x),
    "sqrt": lambda x, y, z: np.sqrt(x),
    "round": lambda x, y, z: np.rint(x),
    "broadcast": lambda x, y, z: np.repeat(x[::16], 16),
    "zero": lambda x, y, z: np.zeros_like(x),
    "rounded_f32": lambda x, y, z: x,
    "round_f16": lambda x, y, z: x.astype(np.float16).astype(np.float32),
    "rounded_f16": lambda x, y, z: x.astype(np.float16).astype(np.float32),
    "to_float": lambda x, y, z: x.view(np.int32).astype(np.float32),
    "load_int8": lambda x, y, z: x.view(np.int8)[: x.size].astype(np.float32),
    "first_of_pairs": lambda x, y, z: (x.view(np.uint32) << 16).view(np.float32),
    "second_of_pairs": lambda x, y, z: (x.view(np.uint32) & 0xFFFF0000).view(np.float32),
    "broadcast_pair": lambda x, y, z: np.repeat((x.view(np.uint32) << 16).view(np.float32)[::16], 16),
}


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_arithmetic_is_numpys(results: Outputs, inputs: Array, name: str) -> None:
    assert_same_bits(floats(results, name), ARITHMETIC[name](*inputs))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fma_rounds_once(results: Outputs, inputs: Array) -> None:
    x, y, z = inputs.astype(np.float64)
    got, exact = floats(results, "fma"), x * y + z
    expected = exact.astype(np.float32)
    # The sum in float64 is rounded a first time, which makes the next neighbour right in rare cases.
    near = (got == expected) | (np.nextafter(expected, np.float32(np.inf)) == got)
    near |= (np.nextafter(expected, np.float32(-np.inf)) == got) | (np.isnan(got) & np.isnan(expected))
    assert near.all()
    assert ((got == expected) | np.isnan(got)).mean() > 0.999


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_exp_is_within_two_units_in_the_last_place(results: Outputs, inputs: Array) -> None:
    x, got = inputs[0], floats(results, "exp")
    exact = np.exp(np.clip(x.astype(np.float64), np.float32(-87.3), np.float32(88.3)))
    numbers = ~np.isnan(x)
    assert numbers.sum() > 50000
    steps = np.abs(got[numbers] - exact[numbers]) / np.spacing(exact[numbers].astype(np.float32))
    assert steps.max() <= 2
    assert np.isnan(got[~numbers]).all()


def test_sums_and_maxima_go_in_halves(results: Outputs, inputs: Array) -> None:
    for name, combine in (("sum", np.add), ("maximum", lambda a, b: np.where(a > b, a, b))):
        lanes = inputs[0].reshape(-1, 16)
        with np.errstate(all="ignore"):
            while lanes.shape[1] > 1:
                half = lanes.shape[1] // 2
                lanes = combine(lanes[:, :half], lanes[:, half:])
        assert_same_bits(floats(results, name), lanes[:, 0])


def test_powers_of_two(results: Outputs) -> None:
    assert_same_bits(floats(results, "power_of_two"), np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32))


@pytest.mark.parametrize("name", ["load_f16", "f16_to_float"])
def test_every_float16_is_read(results: Outputs, name: str) -> None:
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    assert_same_bits(floats(results, name), halves.astype(np.float32))


@pytest.mark.parametrize("name", ["load_bf16", "bf16_to_float"])
def test_every_bfloat16_is_read(results: Outputs, name: str) -> None:
    assert results[name] == (np.arange(65536, dtype=np.uint32) << 16).tobytes()


@pytest.mark.parametrize("name", ["store_f16", "float_to_f16"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_float16_is_written_as_numpy_rounds(results: Outputs, inputs: Array, name: str) -> None:
    got, numbers = np.frombuffer(results[name], np.uint16), ~np.isnan(inputs[0])
    assert np.array_equal(got[numbers], inputs[0].astype(np.float16).view(np.uint16)[numbers])
    assert np.isnan(got.view(np.float16)[~numbers]).all()


@pytest.mark.parametrize("name", ["store_bf16", "float_to_bf16", "round_bf16", "rounded_bf16"])
def test_bfloat16_is_written_as_torch_rounds(results: Outputs, inputs: Array, name: str) -> None:
    expected = torch.from_numpy(inputs[0]).to(torch.bfloat16)
    if name.startswith("round"):
        assert_same_bits(floats(results, name), expected.float().numpy())
        return
    got, numbers = np.frombuffer(results[name], np.uint16), ~np.isnan(inputs[0])
    assert np.array_equal(got[numbers], expected.view(torch.int16).numpy().view(np.uint16)[numbers])
    assert np.isnan((got.astype(np.uint32) << 16).view(np.float32)[~numbers]).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_integers(results: Outputs, inputs: Array) -> None:
    x, y = inputs[0], inputs[1]
    whole = np.rint(x.astype(np.float64))
    fits = (whole >= -(2.0**31)) & (whole < 2.0**31)
    assert np.array_equal(integers(results, "to_int"), np.where(fits, whole, -(2.0**31)).astype(np.int32))
    x, y = x.view(np.int32), y.view(np.int32)
    small_x, small_y = x >> 8, y >> 8
    assert np.array_equal(integers(results, "bits_of"), x)
    assert np.array_equal(integers(results, "add_int"), small_x + small_y)
    assert np.array_equal(integers(results, "max_int"), np.maximum(x, y))
    assert np.array_equal(integers(results, "shift_left"), (x.view(np.uint32) << 5).view(np.int32))
    assert np.array_equal(integers(results, "broadcast_int"), np.repeat(x[::16], 16))
    assert np.array_equal(integers(results, "sum_int"), small_x.reshape(-1, 16).sum(axis=1, dtype=np.int32))
    assert np.array_equal(integers(results, "maximum_int"), x.reshape(-1, 16).max(axis=1))
    assert np.array_equal(np.frombuffer(results["store_int8"], np.int8), x.astype(np.int8))


def test_bytes(results: Outputs, inputs: Array) -> None:
    x, y = inputs[0].view(np.uint8), inputs[1].view(np.int8)
    assert np.array_equal(np.frombuffer(results["low_nibbles"], np.uint8), x & 15)
    assert np.array_equal(np.frombuffer(results["high_nibbles"], np.uint8), x >> 4)
    assert np.array_equal(
        np.frombuffer(results["broadcast_quad"], np.uint8).view(np.uint32), np.repeat(x.view(np.uint32)[::16], 16)
    )
    products = (x.astype(np.int32) * y.astype(np.int32)).reshape(-1, 4).sum(axis=1, dtype=np.int32)
    assert products.min() == 4 * 255 * -128  # what saturates where the products are added up in 16 bits
    assert products.max() == 4 * 255 * 127
    assert np.array_equal(integers(results, "dot_bytes"), (inputs[2].view(np.int32) >> 8) + products)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_dot_of_pairs(results: Outputs, inputs: Array) -> None:
    raw = inputs.view(np.uint32)
    first, second = ((part & 0xFFFF0000).view(np.float32).astype(np.float64) for part in (raw << 16, raw))
    sizes = np.abs(first[0] * first[1]) + np.abs(second[0] * second[1]) + np.abs(inputs[2].astype(np.float64))
    exact = first[0] * first[1] + second[0] * second[1] + inputs[2]
    # Numbers near the ends of float32 overflow, and denormal ones are zero to vdpbf16ps.
    factors = np.abs(np.stack([first[:2], second[:2]])).reshape(4, -1)
    plain = (sizes < 1e37) & (sizes > 1e-30) & ((factors == 0) | (factors > 1e-37)).all(axis=0)
    assert plain.sum() > 10000
    error = np.abs(floats(results, "dot_pairs")[plain] - exact[plain]) / sizes[plain]
    assert error.max() < 2.0**-22


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_parts_of_vectors(results: Outputs, inputs: Array) -> None:
    x, y = inputs[0].reshape(-1, 16), inputs[1].reshape(-1, 16)
    vector, lane = np.arange(x.shape[0])[:, None], np.arange(16)
    loaded = np.where(lane < vector % 17, x, np.float32(0))
    assert_same_bits(floats(results, "load_n"), loaded.reshape(-1))
    assert_same_bits(floats(results, "store_n"), loaded.reshape(-1))
    assert_same_bits(floats(results, "first_n"), np.where(lane < vector % 17, x, y).reshape(-1))

    inside = lane < 1 + vector % 16
    halves = inputs[0].view(np.uint16)[: x.size].reshape(-1, 16)
    read = {"f32": x, "bf16": (halves.astype(np.uint32) << 16).view(np.float32)}
    read["f16"] = halves.view(np.float16).astype(np.float32)
    for dtype, all_lanes in read.items():
        expected = np.where(inside, all_lanes, np.float32(0)).reshape(-1)
        assert_same_bits(floats(results, f"load_as_n_{dtype}"), expected)
    assert results["store_as_n_f32"] == np.where(inside, x, np.float32(0)).tobytes()
    for dtype in ("bf16", "f16"):
        whole = np.frombuffer(results[f"store_{dtype}"], np.uint16).reshape(-1, 16)
        assert results[f"store_as_n_{dtype}"] == np.where(inside, whole, np.uint16(0)).tobytes()


def test_levels_are_those_of_the_module(kernels: ModuleType, outputs: dict[str, Outputs]) -> None:
    assert list(outputs) == kernels.supported_levels()
    assert len(outputs["portable"]) > 40
