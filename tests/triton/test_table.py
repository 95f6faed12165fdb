"""The table of Triton kernels: every op has an answer, and refusals say why."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from puna.ops import OP_NAMES, OpSpec, TritonBackend, triton_rotary, triton_table

SPEC = OpSpec(device=torch.device("cpu"), dtype=torch.bfloat16, head_size=128, differentiable=False)


def test_every_op_has_a_launcher_or_a_reason() -> None:
    answers = {op: triton_table.function(op, SPEC) for op in OP_NAMES}
    reasons = {op: answer for op, answer in answers.items() if isinstance(answer, str)}
    # For training, and as the oracle.
    assert set(reasons) == {"attention"}
    assert all(callable(answer) for op, answer in answers.items() if op not in reasons)


def test_sizes_that_a_kernel_does_not_take_are_refused_with_the_reason() -> None:
    odd = dataclasses.replace(SPEC, head_size=127)
    assert triton_table.function("rotate_and_store", SPEC) is triton_rotary.rotate_and_store
    assert "heads of 127" in str(triton_table.function("rotate_and_store", odd))
    assert "no kernel" in str(triton_table.function("attention", SPEC))


@pytest.mark.parametrize(
    "op",
    [
        *("linear", "gated_linear", "panel_linear", "panel_gated_linear", "scaled_linear", "scaled_gated_linear"),
        *("paged_attention", "prompt_attention", "experts", "panel_experts"),
    ],
)
def test_launchers_that_choose_by_the_batch_are_told_of_the_deterministic_mode(op: str) -> None:
    usual = triton_table.function(op, SPEC)
    strict = triton_table.function(op, dataclasses.replace(SPEC, deterministic=True))
    assert isinstance(strict, functools.partial)
    assert strict.func is usual
    assert strict.keywords == {"deterministic": True}


def test_the_others_serve_both() -> None:
    strict = dataclasses.replace(SPEC, deterministic=True)
    assert triton_table.function("rms_norm", strict) is triton_table.function("rms_norm", SPEC)


def test_gradients_are_left_to_the_reference() -> None:
    assert TritonBackend().function("rms_norm", dataclasses.replace(SPEC, differentiable=True)) == (
        "the kernels have no gradients"
    )
