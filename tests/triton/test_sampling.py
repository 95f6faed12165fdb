"""Choosing tokens in Triton: what the CPU's compiled kernels choose, and float64 by sorting; log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from draw_oracle import CASES, TOLERANCE, arguments, intervals
from puna.ops import cpu, triton_argmax, triton_logprobs, triton_sampling
from puna.runtime import logprobs, sampling_ops
from puna.scheduling.step_plan import TokenLogprobs

INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def fused(device: torch.device) -> Iterator[None]:
    """Lets the interpreter multiply and add with one rounding, as GPUs and the CPU's kernels do: it rounds twice. The
    sum in float64 is exact but for one case in 2**29."""
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            from triton.runtime import interpreter

            def fma(self: object, x: Any, y: Any, z: Any) -> Any:
                exact = x.data.astype(np.float64) * y.data + z.data
                return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

            patch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
        yield


def on(device: torch.device, given: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else value.to(device) for name, value in given.items()}


def compiled_draw(given: dict[str, Any]) -> Tensor:
    return cpu.draw(given["logits"], *(given[name] for name in ("temperature", "top_k", "top_p", "min_p", "uniform")))[
        0
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(sorted(case)) or "plain")
def test_draws_what_the_cpu_draws_and_float64(device: torch.device, case: frozenset[str]) -> None:
    shapes = [(1, 1.0), (100, 8.0), (2049, 2.0)] if device.type == "cpu" else [(1, 1.0), (3001, 2.0), (128_256, 4.0)]
    for seed, (width, scale) in enumerate(shapes):
        given = arguments(3 if device.type == "cpu" else 200, width, case, scale, seed)
        tokens, highest = triton_sampling.draw(**on(device, given))
        assert torch.equal(highest.cpu(), given["logits"].amax(dim=1))
        if cpu.compiled():
            assert torch.equal(tokens.cpu(), compiled_draw(given))
        for row, (token, uniform) in enumerate(zip(tokens.tolist(), given["uniform"].tolist(), strict=True)):
            begins, ends = intervals(given, row)
            assert begins[token] < ends[token]
            assert begins[token] - TOLERANCE <= uniform <= ends[token] + TOLERANCE


def test_rows_of_all_kinds_in_one_call(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 4500
    given = arguments(5, width, frozenset(["top_k", "top_p", "min_p"]), 2.0, 1)
    given["temperature"][0], given["temperature"][2] = 0.0, 1.0
    given["top_k"][1:3] = torch.tensor([width, 40])
    given["top_p"][1:4] = torch.tensor([1.0, 1.0, 0.5])
    given["min_p"][:] = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0])
    moved = on(device, given)
    tokens, _ = triton_sampling.draw(**moved)
    assert int(tokens[0]) == int(given["logits"][0].argmax())
    if cpu.compiled():
        assert torch.equal(tokens[1:].cpu(), compiled_draw({name: value[1:] for name, value in given.items()}))
    # However many programs a row is cut among, and whatever the other rows are.
    monkeypatch.setattr(triton_argmax, "multiprocessors", lambda device: 1)
    assert torch.equal(triton_sampling.draw(**moved)[0], tokens)
    alone = triton_sampling.draw(**{name: value[4:] for name, value in moved.items()})[0]
    assert torch.equal(alone, tokens[4:])


def draw_one(device: torch.device, x: list[float], uniform: float, **more: Any) -> int:
    ones: dict[str, Any] = {"top_k": None, "top_p": None, "min_p": None, "temperature": torch.ones(1)}
    ones |= {name: torch.tensor([value]) for name, value in more.items()}
    ones |= {"logits": torch.tensor([x]), "uniform": torch.tensor([uniform], dtype=torch.float64)}
    return int(triton_sampling.draw(**on(device, ones))[0])


def test_ties(device: torch.device) -> None:
    level = [0.0] * 40
    assert draw_one(device, level, 0.999, top_k=3) == 39  # all are level with the third
    assert draw_one(device, level, 0.999, top_p=np.float64(0.5)) == 19  # the lowest ids
    assert draw_one(device, level, 0.0, top_p=np.float64(0.5)) == 0
    assert draw_one(device, level, 0.999, top_p=np.float64(0.0)) == 0
    assert draw_one(device, [0.0, -0.0, 0.0], 0.999, top_k=1) == 2  # both zeros are level
    # More at the edge than are listed.
    many = [0.0] * 5000
    assert draw_one(device, many, 0.9999999, top_p=np.float64(0.3)) == 1499
    assert draw_one(device, [*many, 1.0], 0.9999999, top_k=2) == 5000


def test_what_is_ruled_out_or_not_finite(device: torch.device) -> None:
    apart = [-INFINITY] * 30 + [1.0] + [-INFINITY] * 9
    for uniform in (0.0, 1 - 2.0**-53, 1.0):
        assert draw_one(device, apart, uniform) == 30
        assert draw_one(device, apart, uniform, top_k=5, top_p=np.float64(0.3)) == 30
    for bad in ([NAN, 1.0], [INFINITY, 1.0], [-INFINITY, -INFINITY]):
        assert draw_one(device, bad, 0.5, top_k=1) == 0
    for temperature in (-1.0, NAN, INFINITY):
        assert draw_one(device, [1.0, -INFINITY, 2.0], 0.0, temperature=temperature) == 0
    assert draw_one(device, [1.0, -INFINITY, 2.0], 0.0, temperature=0.0) == 2
    tiny = float(torch.finfo(torch.float32).tiny)
    assert draw_one(device, [1.0, -INFINITY, 2.0], 0.5, temperature=tiny, top_p=np.float64(0.9)) == 2


def test_random_numbers_are_the_cpus(device: torch.device) -> None:
    seeds = np.array([0, 1, 2, 2**63 + 5, 2**64 - 1] * 30, dtype=np.uint64)
    positions = np.arange(150, dtype=np.uint64) ** np.uint64(4)
    given = (torch.from_numpy(part.view(np.int64)).to(device) for part in (seeds, positions))
    assert triton_sampling.uniforms(*given).tolist() == sampling_ops.uniforms(seeds, positions).tolist()


def test_wrong_tensors_are_refused(device: torch.device) -> None:
    given = on(device, arguments(4, 10, frozenset(["top_k", "top_p", "min_p"]), 1.0, 0))
    for name, tensor in (
        ("temperature", given["temperature"][:3]),
        ("top_k", given["top_k"].int()),
        ("top_p", given["top_p"].float()),
        ("min_p", given["min_p"].unsqueeze(1)),
        ("uniform", given["uniform"].float()),
        ("logits", given["logits"].double()),
    ):
        with pytest.raises(ValueError, match=name):
            triton_sampling.draw(**given | {name: tensor})
    with pytest.raises(ValueError, match="token_ids"):
        triton_logprobs.token_logprobs(given["logits"], torch.zeros(3, dtype=torch.int64, device=device), 1)
    with pytest.raises(ValueError, match="k is 11"):
        triton_logprobs.top_k(given["logits"], 11)


def test_logprobs(device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5003, generator=random).round(decimals=1) * 3
    x[1, 7] = NAN
    x[2] = -INFINITY
    x[3, 5] = INFINITY
    x[4, 4096:] = -INFINITY
    x[5, :4998] = -INFINITY
    chosen = torch.randint(0, 5003, (6,), generator=random)
    found = triton_logprobs.token_logprobs(x.to(device), chosen.to(device), 7)
    exact = x.double().log_softmax(dim=1)
    torch.testing.assert_close(
        found.own.cpu().double(), exact.gather(1, chosen.unsqueeze(1)).squeeze(1), atol=1e-5, rtol=1e-6, equal_nan=True
    )
    assert found.ranks.tolist() == [int((row > row[token]).sum()) + 1 for row, token in zip(x, chosen, strict=True)]
    for row in (0, 4, 5):
        order = x[row].sort(descending=True, stable=True).indices[:7]
        count = min(7, int(x[row].isfinite().sum()))
        assert found.top_ids[row, :count].tolist() == order[:count].tolist()
        torch.testing.assert_close(found.top_logprobs[row].cpu().double(), exact[row, order], atol=1e-5, rtol=1e-6)
    assert found.top_logprobs[1:4].isnan().all()
    values, ids = triton_logprobs.top_k(x[:1].to(device), 7)
    assert torch.equal(ids, found.top_ids[:1])
    assert values.tolist() == x[:1].gather(1, ids.cpu()).tolist()


def test_logprobs_do_not_depend_on_the_other_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 6000, generator=torch.Generator().manual_seed(1)).to(device)
    chosen = torch.tensor([5, 4000, 17], device=device)
    found = triton_logprobs.token_logprobs(x, chosen, 3)
    monkeypatch.setattr(triton_argmax, "multiprocessors", lambda device: 1)
    for part, alone in zip(found, triton_logprobs.token_logprobs(x[1:2], chosen[1:2], 3), strict=True):
        assert torch.equal(part[1:2], alone)


def test_logprobs_as_the_sampler_reports_them(device: torch.device) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(2))
    x[1, 7] = NAN
    x[2, :298] = -INFINITY
    chosen = torch.tensor([5, 40, 299, 17])
    found = logprobs._on_gpu(x.to(device), chosen.to(device), 3)
    for one, other in zip(found, logprobs.token_logprobs(x, chosen, 3), strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-5, nan_ok=True)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def numbers(one: TokenLogprobs) -> list[float]:
    return [one.logprob, *(logprob for _, logprob in one.top)]


def launch_all() -> None:
    """Run by the compiler for Hopper, with the vocabulary of Llama 3."""
    for rows in (1, 64, 1024):
        logits = torch.empty(rows, 128_256)
        ids, ones, shares = (torch.ones(rows, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float64))
        triton_sampling.draw(logits, ones, None, None, None, shares)
        triton_sampling.draw(logits, ones, ids, shares, ones, shares)
        triton_sampling.uniforms(ids, ids)
        triton_logprobs.token_logprobs(logits, ids, 20)


def test_compiles_for_hopper_without_spills(compiled_for_hopper: Callable[[str], list[dict[str, Any]]]) -> None:
    kernels = compiled_for_hopper("test_sampling.launch_all")
    names = {kernel["kernel"] for kernel in kernels}
    parts = {"peaks", "join_peaks", "histogram", "cut", "sums", "point", "uniforms", "tiles", "rows"}
    assert names == {f"_{part}_kernel" for part in parts}
    for kernel in kernels:
        assert kernel["stack"] == kernel.get("LDL", 0) == kernel.get("STL", 0) == 0
        # Four blocks of 128 threads, or two of 256, in the 65,536 registers of a multiprocessor.
        assert kernel["registers"] <= 128
