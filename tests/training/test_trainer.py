"""The trainer's numbers: against transformers and a plain loop, after a stop and a resume, and in bfloat16."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from puna.models import load_model
from puna.training.run import ModelShape, Sources, prepare
from puna.training.state import STATE_FILE
from puna.training.trainer import HeldOut, Step, Trainer, TrainingOptions

Options = Callable[..., TrainingOptions]


def losses_of(trainer: Trainer, steps: int | None = None) -> list[float]:
    """Runs the trainer to its end, or until it has done `steps` and has saved them if it saves then."""
    losses = []
    for event in trainer.run():
        if isinstance(event, Step):
            if steps is not None and event.number > steps:
                break
            losses.append(event.loss)
    return losses


def test_losses_are_those_of_transformers(sources: Sources, shape: ModelShape, options: Options) -> None:
    """The same weights and batches in transformers' LLaMA with an optimiser written out here."""
    trainer = prepare(sources, shape, options(steps=6, warmup_steps=2, gradient_clip=0.5, gradient_accumulation=2))
    trainer.save()
    theirs = AutoModelForCausalLM.from_pretrained(sources.out, dtype=torch.float32).train()
    parameters = list(theirs.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    rates = [1.5e-3, 3e-3, 3e-3, *(3e-3 * (0.55 + 0.45 * math.cos(math.pi * place / 4)) for place in (1, 2, 3))]
    expected = []
    for step, rate in enumerate(rates):
        inputs, targets = trainer.windows.batch(4 * step, 4)
        loss = torch.nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
        expected.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        assert norm > 0.5, "otherwise nothing is clipped"
        for parameter, (mean, square), gradient in zip(parameters, moments, gradients, strict=True):
            gradient = gradient * 0.5 / norm
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.05)
            update = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                parameter *= 1 - rate * (0.1 if parameter.dim() == 2 else 0.0)
                parameter -= rate * update
    assert losses_of(trainer) == pytest.approx(expected, rel=2e-5)


def test_training_learns(sources: Sources, shape: ModelShape, options: Options) -> None:
    trainer = prepare(sources, shape, options(steps=60, learning_rate=1e-2, eval_every=30))
    events = list(trainer.run())
    held_out = [event for event in events if isinstance(event, HeldOut)]
    assert [event.step for event in held_out] == [30, 60]
    assert [event.number for event in events if isinstance(event, Step)] == list(range(1, 61))
    assert held_out[1].nats < held_out[0].nats < math.log(300)
    assert held_out[1].nats < 2.5, "sentences with a dozen choices, of about five tokens each"


def test_held_out_loss_is_the_mean_over_its_tokens(sources: Sources, shape: ModelShape, options: Options) -> None:
    trainer = prepare(sources, shape, options())
    (result,) = trainer.evaluate()
    stream = trainer.held_out["text.txt"]
    nats = []
    with torch.no_grad():
        for start in range(0, len(stream.ids) - 1, 32):
            window = stream.ids[start : start + 33]
            log_probs = trainer.model(window[None, :-1])[0].log_softmax(-1)
            nats += log_probs.gather(1, window[1:, None]).flatten().neg().tolist()
    assert result.nats == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / stream.num_bytes, rel=1e-5)
    assert result.tokens == len(nats) == len(stream.ids) - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_run_is_the_same_bit_for_bit(
    sources: Sources, shape: ModelShape, options: Options, tmp_path: Path, dtype: str
) -> None:
    run = options(dtype=dtype)
    straight = losses_of(prepare(sources, shape, run))
    assert len(straight) == 20

    stopped = dataclasses.replace(sources, out=tmp_path / "stopped")
    before = losses_of(prepare(stopped, shape, run), steps=12)
    after = losses_of(prepare(dataclasses.replace(stopped, resume=True), shape, run))
    assert before == straight[:12]
    assert after == straight[10:], "the last checkpoint was that of step 10"
    weights, resumed = (load_file(folder / STATE_FILE) for folder in (sources.out, stopped.out))
    assert weights.keys() == resumed.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, resumed[name]), name
    files = [{file.name: file.read_bytes() for file in out.iterdir()} for out in (sources.out, stopped.out)]
    assert files[0] == files[1]


@pytest.mark.parametrize("moment", range(6))
def test_checkpoint_that_is_cut_off_leaves_a_whole_one(
    sources: Sources, shape: ModelShape, options: Options, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """A save renames the state and then the model's five files; it ends before one of these."""
    trainer = prepare(sources, shape, options())
    losses_of(trainer, steps=6)
    real, count = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal count
        if count == moment:
            raise KeyboardInterrupt
        count += 1
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    monkeypatch.setattr(os, "replace", real)
    load_model(sources.out)
    resumed = prepare(dataclasses.replace(sources, resume=True), shape, options())
    assert resumed.steps_done == (5 if moment == 0 else trainer.steps_done)
    resumed.save()
    assert not list(sources.out.glob(".writing-*"))


def test_resume_refuses_another_run(sources: Sources, shape: ModelShape, options: Options, text_file: Path) -> None:
    prepare(sources, shape, options()).save()
    again = dataclasses.replace(sources, resume=True)
    for changed in (options(learning_rate=1e-3), options(steps=40), options(seed=4), options(batch_size=8)):
        with pytest.raises(ValueError, match=r"is of a run with (learning_rate|steps|seed|batch_size) "):
            prepare(again, shape, changed)
    with pytest.raises(ValueError, match=r"with num_hidden_layers 2, and now it is 3"):
        prepare(again, dataclasses.replace(shape, num_layers=3), options())
    text_file.write_text("More. " + text_file.read_text())
    with pytest.raises(ValueError, match=r"is of a run with text "):
        prepare(again, shape, options())


def test_resume_refuses_a_damaged_state(sources: Sources, shape: ModelShape, options: Options) -> None:
    prepare(sources, shape, options()).save()
    state = sources.out / STATE_FILE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"training_state.safetensors is damaged"):
        prepare(dataclasses.replace(sources, resume=True), shape, options())


def test_finished_run_has_nothing_left_to_do(sources: Sources, shape: ModelShape, options: Options) -> None:
    list(prepare(sources, shape, options(steps=4)).run())
    assert list(prepare(dataclasses.replace(sources, resume=True), shape, options(steps=4)).run()) == []


def test_accumulation_changes_rounding_only(
    sources: Sources, shape: ModelShape, options: Options, tmp_path: Path
) -> None:
    losses = [
        losses_of(prepare(dataclasses.replace(sources, out=tmp_path / str(parts)), shape, run))
        for parts in (1, 2, 4)
        for run in [options(gradient_accumulation=parts, steps=8)]
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_saved_folder_gives_the_same_logits_everywhere(sources: Sources, shape: ModelShape, options: Options) -> None:
    trainer = prepare(sources, shape, options(steps=10))
    list(trainer.run())
    ids = trainer.held_out["text.txt"].ids[None, :32]
    with torch.no_grad():
        trained = trainer.model(ids)
        loaded = load_model(sources.out)(ids)
        theirs = AutoModelForCausalLM.from_pretrained(sources.out, dtype=torch.float32)(ids).logits
    assert torch.equal(trained, loaded)
    assert float((trained - theirs).abs().max() / theirs.abs().max()) < 2e-5
    generation = json.loads((sources.out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0], "bos_token_id": 0, "pad_token_id": 0}


def test_model_is_saved_in_the_dtype_asked_for(sources: Sources, shape: ModelShape, options: Options) -> None:
    trainer = prepare(sources, shape, options(save_dtype="bfloat16"))
    trainer.save()
    weight = load_file(sources.out / "model.safetensors")["model.norm.weight"]
    assert weight.dtype == torch.bfloat16
    assert next(trainer.model.parameters()).dtype == torch.float32
    loaded = load_model(sources.out)
    assert loaded.config.dtype == "bfloat16"
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name).bfloat16())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(
    sources: Sources, shape: ModelShape, options: Options, tmp_path: Path
) -> None:
    exact = losses_of(prepare(sources, shape, options()))
    trainer = prepare(dataclasses.replace(sources, out=tmp_path / "other"), shape, options(dtype="bfloat16"))
    rounded = losses_of(trainer)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_learning_rate_goes_up_and_down(options: Options) -> None:
    run = options(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [run.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0.1 < rates[-1] < 0.102
