"""What a run refuses before it begins, and where its tokenizer and its first weights come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from puna.engine.tokenizer import Tokenizer
from puna.models import load_model
from puna.training.replicas import Replicas
from puna.training.run import ModelShape, Sources, prepare
from puna.training.state import remove_partial_files
from puna.training.trainer import Trainer, TrainingOptions

Options = Callable[..., TrainingOptions]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0"),
        ({"context": 1}, "context is 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup_steps": 21}, r"warmup_steps is 21: it must be in 0\.\.20"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"gradient_clip": 0.0}, "gradient_clip is 0.0.*inf for no clipping"),
        ({"dtype": "float16"}, "dtype is 'float16': it must be float32 or bfloat16"),
        ({"save_dtype": "int8"}, "save_dtype is 'int8'"),
        ({"save_every": -1}, "save_every is -1"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(options: Options, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 30}, "hidden_size is 30: it must be a multiple of 8"),
        ({"hidden_size": 36}, "hidden_size is 36: it must be a multiple of 8"),
        ({"num_heads": 0}, "hidden_size is 32"),
        ({"vocab_size": 256}, "vocab_size is 256: it must be at least 257"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3: it must divide num_heads, 4"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"mlp_hidden_size": 0}, "mlp_hidden_size is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    sources: Sources, shape: ModelShape, options: Options, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(sources, dataclasses.replace(shape, **change), options())
    assert not sources.out.exists()


def test_sources_that_can_not_be_used_are_refused(
    sources: Sources, shape: ModelShape, options: Options, tmp_path: Path
) -> None:
    def refused(message: str, kind: type[Exception] = ValueError, **changes: object) -> None:
        with pytest.raises(kind, match=message):
            prepare(dataclasses.replace(sources, **changes), shape, options())  # type: ignore[arg-type]
        assert not sources.out.exists()

    refused("nowhere.txt is not a file", FileNotFoundError, data=[tmp_path / "nowhere.txt"])
    refused("nowhere.txt is not a file", FileNotFoundError, held_out=[tmp_path / "nowhere.txt"])
    refused("eval_fraction is 0.7", eval_fraction=0.7)
    refused("text.txt is a file: name a folder", out=tmp_path / "text.txt")
    refused("not a folder", FileNotFoundError, init=str(tmp_path / "nowhere"))
    refused("not a folder", FileNotFoundError, tokenizer=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refused("tokenizer", (ValueError, FileNotFoundError), tokenizer=str(tmp_path / "empty"))  # type: ignore[arg-type]
    (tmp_path / "x.gguf").write_bytes(b"")
    refused("has its tokenizer inside: name a folder", ValueError, tokenizer=str(tmp_path / "x.gguf"))
    with pytest.raises(ValueError, match="device is 'abacus'"):
        prepare(sources, shape, options(), device="abacus")
    with pytest.raises(ValueError, match="batch_size is 4: it must be a multiple of 6"):
        prepare(sources, shape, options(gradient_accumulation=2), replicas=Replicas(0, 3))


def test_text_shorter_than_the_context_is_refused(sources: Sources, shape: ModelShape, options: Options) -> None:
    with pytest.raises(ValueError, match=r"the context is 100000 tokens, but the text .* has only \d+: give more text"):
        prepare(sources, shape, options(context=100_000))


def test_another_run_is_not_overwritten(sources: Sources, shape: ModelShape, options: Options) -> None:
    trainer = prepare(sources, shape, options())
    assert prepare(sources, shape, options()).steps_done == 0, "before the first checkpoint there is nothing to lose"
    trainer.save()
    with pytest.raises(ValueError, match="out holds another run: add --resume"):
        prepare(sources, shape, options())
    (sources.out / "training_state.safetensors").unlink()
    with pytest.raises(ValueError, match="out holds a model, which would be overwritten"):
        prepare(dataclasses.replace(sources, resume=True), shape, options())


def test_training_goes_on_from_a_checkpoint_and_its_tokenizer(
    sources: Sources, shape: ModelShape, options: Options, tmp_path: Path
) -> None:
    first = prepare(sources, shape, options(steps=30, learning_rate=1e-2))
    list(first.run())
    (before,) = first.evaluate()
    further = dataclasses.replace(sources, out=tmp_path / "further", init=str(sources.out))
    second = prepare(further, ModelShape(), options())
    (start,) = second.evaluate()
    assert start.nats == before.nats
    assert (further.out / "tokenizer.json").read_bytes() == (sources.out / "tokenizer.json").read_bytes()
    list(second.run())
    assert load_model(further.out).generation_config == load_model(sources.out).generation_config
    with pytest.raises(ValueError, match=r"the context is 64 tokens, but .* was made for 32"):
        prepare(dataclasses.replace(further, out=tmp_path / "third"), ModelShape(), options(context=64))


def test_a_given_tokenizer_is_used(
    sources: Sources, shape: ModelShape, options: Options, tmp_path: Path, text_file: Path
) -> None:
    prepare(sources, shape, options()).save()
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely, " * 40)
    given = dataclasses.replace(sources, data=[other], out=tmp_path / "given", tokenizer=str(sources.out))
    trainer = prepare(given, shape, options())
    assert (given.out / "tokenizer.json").read_bytes() == (sources.out / "tokenizer.json").read_bytes()
    assert trainer.model.config.vocab_size == Tokenizer.from_pretrained(sources.out).vocab_size


def test_half_precision_weights_are_refused(sources: Sources, shape: ModelShape, options: Options) -> None:
    trainer = prepare(sources, shape, options())
    trainer.save()
    with pytest.raises(ValueError, match="the model is in bfloat16: load it with dtype='float32'"):
        Trainer(load_model(sources.out, dtype="bfloat16"), trainer.held_out["text.txt"], {}, options(), sources.out, {})


def test_files_of_one_name_keep_their_losses_apart(
    sources: Sources, shape: ModelShape, options: Options, tmp_path: Path, text_file: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / text_file.name
    other.write_text("Another text.\n" * 50)
    trainer = prepare(dataclasses.replace(sources, data=[text_file, other]), shape, options())
    assert [result.name for result in trainer.evaluate()] == [str(text_file), str(other)]


def test_seed_alone_decides_the_first_weights(
    sources: Sources, shape: ModelShape, options: Options, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    first, second, other = (
        prepare(dataclasses.replace(sources, out=tmp_path / name), shape, options(seed=seed)).model.state_dict()
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert tensor.dim() == 1 or not torch.equal(tensor, other[name])


def test_projections_into_the_residual_stream_start_small(
    sources: Sources, shape: ModelShape, options: Options
) -> None:
    model = prepare(sources, shape, options()).model
    deviations = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.dim() == 2}
    for name, deviation in deviations.items():
        expected = 0.01 if name.endswith(("dense.weight", "proj.weight")) else 0.02
        assert deviation == pytest.approx(expected, rel=0.1), name


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".writing-abc").mkdir()
    (tmp_path / ".writing-abc" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".writing-training_state.safetensors").write_bytes(b"half")
    (tmp_path / "kept").write_bytes(b"whole")
    remove_partial_files(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
