"""`puna info`: every family, split and foreign checkpoints, and this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna import __version__
from puna.config import LLaMAConfig, RotaryScaling
from puna.models import MODELS
from puna.models.loading import save_model
from puna.ops import cpu

Run = Callable[..., Any]

SIZES = {
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "hidden_size": 24,
    "mlp_hidden_size": 40,
    "vocab_size": 101,
    "max_position_embeddings": 128,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "attn_bias": True,
        "attn_output_bias": True,
        "mlp_bias": True,
        "rotary_scaling": RotaryScaling(type="linear", factor=4.0),
    },
    "MistralForCausalLM": {"sliding_window": 16},
    "Qwen2ForCausalLM": {"attn_bias": True, "tie_embeddings": True},
    "Qwen3ForCausalLM": {"qk_norm": True, "sliding_window": 16, "sliding_window_layers": (1,)},
    "MixtralForCausalLM": {"num_experts": 4, "experts_per_token": 2},
}


def make_folder(folder: Path, architecture: str, random_model: Any, dtype: str = "float32") -> tuple[Path, Any]:
    """A model of the family in the folder, with the tokenizer of `random_model`; and the model."""
    config = LLaMAConfig(architecture=architecture, dtype=dtype, **SIZES, **VARIANTS[architecture])
    model = MODELS[architecture](config)
    files = {name: (random_model.path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    save_model(model, folder, files)
    return folder, model


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def expected_parts(model: Any) -> dict[str, int]:
    """Counted on the modules of the model itself."""
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "router": 0, "experts": 0, "norms": 0, "head": 0}
    for name, parameter in model.named_parameters():  # a tied weight comes once, as the embedding
        if "norm" in name or "ln_f" in name:
            part = "norms"
        elif "vocab_embedding" in name:
            part = "embedding"
        elif "lm_head" in name:
            part = "head"
        else:
            part = next(part for part in ("attention", "router", "experts", "mlp") if f".{part}." in f"{name}.")
        parts[part] += parameter.numel()
    return {**{part: count for part, count in parts.items() if count}, "total": sum(parts.values())}


@pytest.mark.parametrize("architecture", MODELS)
def test_every_family(puna: Run, tmp_path: Path, random_model: Any, architecture: str) -> None:
    folder, model = make_folder(tmp_path / "model", architecture, random_model, dtype="bfloat16")
    done = puna("info", folder, "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert report["architecture"] == architecture
    assert (report["supported"], report["problem"], report["dtype"]) == (True, None, "bfloat16")
    parameters = report["parameters"]
    active = parameters.pop("active", None)
    assert parameters == expected_parts(model)
    if architecture == "MixtralForCausalLM":
        assert active == parameters["total"] - parameters["experts"] // 2
        assert report["experts"] == {"experts": 4, "experts_per_token": 2}
    else:
        assert active is None
    assert report["memory_bytes"] == {part: 2 * count for part, count in parameters.items()}
    assert report["stored_bytes"] == 2 * parameters["total"]
    assert report["key_value_bytes_per_token"] == 2 * 2 * 2 * 8 * 2
    assert report["key_value_bytes_full_context"] == 128 * report["key_value_bytes_per_token"] * (
        4 if architecture == "LlamaForCausalLM" else 1
    )
    assert report["attention"] == {"heads": 4, "key_value_heads": 2, "head_size": 8}
    assert report["context"] == (512 if architecture == "LlamaForCausalLM" else 128)
    assert report["vocabulary"] == 101
    assert report["tied_embeddings"] == (architecture == "Qwen2ForCausalLM")
    assert report["rotary"] == ("linear" if architecture == "LlamaForCausalLM" else "default")
    has_window = architecture in ("MistralForCausalLM", "Qwen3ForCausalLM")
    assert report["sliding_window"] == (16 if has_window else None)
    assert report["chat_template"] is False
    assert set(report["ops_on_cpu"].values()) == {"compiled" if cpu.compiled() else "reference"}
    assert any("experts" in op for op in report["ops_on_cpu"]) == (architecture == "MixtralForCausalLM")
    assert "paged_attention" in report["ops_on_cpu"]


def test_text(puna: Run, tmp_path: Path, random_model: Any) -> None:
    folder, model = make_folder(tmp_path / "model", "Qwen3ForCausalLM", random_model)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.95}')
    lines = puna("info", folder).out.splitlines()
    rows = {line[:14].strip(): line[14:].strip() for line in lines[: lines.index("")]}
    assert rows["architecture"] == "Qwen3ForCausalLM"
    assert rows["attention"].startswith("4 heads of 8, 2 for keys and values")
    assert rows["sliding window"] == "16 tokens in 1 of 2 layers"
    assert rows["rotary"] == "default, base 10000"
    assert rows["tokenizer"].startswith("yes")
    assert rows["chat template"] == "yes"
    assert rows["generation"] == "sampled, temperature 0.6, top_p 0.95"
    assert rows["supported"] == "yes"
    assert " for all " in rows["ops on cpu"]
    total = expected_parts(model)["total"]
    table = next(line.split() for line in lines if line.startswith("total"))
    assert table == ["total", f"{total / 1000:.2f}", "K", f"{total * 4 / 1024:.2f}", "KiB"]
    assert lines[-1] == "KV cache: 256 B a token, 32.00 KiB for the whole context of 128"


def test_memory_for_another_dtype(puna: Run, random_model: Any) -> None:
    report = json.loads(puna("info", random_model, "--json", "--dtype", "float16").out)
    assert report["dtype"] == "float16"
    assert report["memory_bytes"]["total"] == 2 * report["parameters"]["total"]
    assert report["stored_bytes"] == 4 * report["parameters"]["total"]


def test_sharded(puna: Run, tmp_path: Path, random_model: Any) -> None:
    folder, model = make_folder(tmp_path / "model", "LlamaForCausalLM", random_model)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    report = json.loads(puna("info", folder, "--json").out)
    assert report["supported"]
    assert report["parameters"] == expected_parts(model)

    (folder / files[names[0]]).unlink()
    report = json.loads(puna("info", folder, "--json").out)
    assert not report["supported"]
    assert files[names[0]] in report["problem"]
    assert report["parameters"] == expected_parts(model)  # as the config says


def test_architecture_that_is_not_supported(puna: Run, tmp_path: Path, random_model: Any) -> None:
    folder, model = make_folder(tmp_path / "model", "LlamaForCausalLM", random_model)
    edit_config(folder, architectures=["GemmaForCausalLM"], model_type="gemma")
    done = puna("info", folder)
    assert (done.code, done.err) == (0, "")
    assert "supported      no (" in done.out
    report = json.loads(puna("info", folder, "--json").out)
    assert report["architecture"] == "GemmaForCausalLM"
    assert "the architecture 'GemmaForCausalLM' is not supported" in report["problem"]
    assert (report["layers"], report["hidden_size"], report["context"], report["vocabulary"]) == (2, 24, 128, 101)
    assert report["parameters"] == expected_parts(model)
    assert report["memory_bytes"]["total"] == 4 * report["parameters"]["total"]
    assert report["dtype"] is None


def test_names_of_tensors_tell_the_same_as_the_config(puna: Run, tmp_path: Path, random_model: Any) -> None:
    folder, model = make_folder(tmp_path / "model", "MixtralForCausalLM", random_model)
    edit_config(folder, architectures=["OtherForCausalLM"])
    assert json.loads(puna("info", folder, "--json").out)["parameters"] == expected_parts(model)


def test_quantisation_that_is_not_supported(puna: Run, tmp_path: Path, random_model: Any) -> None:
    folder, _ = make_folder(tmp_path / "model", "LlamaForCausalLM", random_model)
    tensors = load_file(folder / "model.safetensors")
    packed = {
        name.replace("weight", "qweight") if "mlp" in name else name: torch.zeros(3, 5, dtype=torch.int32)
        if "mlp" in name
        else tensor
        for name, tensor in tensors.items()
    }
    save_file(packed, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    done = puna("info", folder, "--json")
    report = json.loads(done.out)
    assert done.code == 0
    assert "the quantization method 'gptq' is not supported" in report["problem"]
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["weights"] == ["I32", "float32"]
    assert report["parameters"] == {}  # packed numbers are none
    assert report["memory_bytes"]["mlp"] == 4 * 15 * sum("qweight" in name or "mlp" in name for name in packed)
    assert report["memory_bytes"]["total"] == report["stored_bytes"]
    assert "mlp" in puna("info", folder).out.split("as stored")[1]


def test_tensors_that_do_not_fit_the_config(puna: Run, tmp_path: Path, random_model: Any) -> None:
    folder, _ = make_folder(tmp_path / "model", "LlamaForCausalLM", random_model)
    edit_config(folder, num_hidden_layers=3)
    report = json.loads(puna("info", folder, "--json").out)
    assert not report["supported"]
    assert "has no tensor model.layers.2." in report["problem"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors files"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "damaged or incomplete"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "generation_config.json").write_text('{"top_p": "high"}'), "top_p is 'high'"),
        (lambda folder: edit_config(folder, hidden_size="wide"), "hidden_size is 'wide'"),
    ],
)
def test_what_is_wrong_is_told_with_what_is_known(
    puna: Run, tmp_path: Path, random_model: Any, damage: Callable[[Path], Any], problem: str
) -> None:
    folder = Path(shutil.copytree(random_model.path, tmp_path / "model"))
    damage(folder)
    done = puna("info", folder, "--json")
    report = json.loads(done.out)
    assert (done.code, report["supported"], report["layers"]) == (0, False, 2)
    assert problem in report["problem"]
    text = puna("info", folder).out
    assert problem in next(line for line in text.splitlines() if line.startswith("supported"))


@pytest.mark.parametrize("devices", [("cuda",), ("cpu", "cuda")])
def test_a_device_without_what_a_model_needs_is_no_problem_while_another_has_it(
    puna: Run, random_model: Any, monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...]
) -> None:
    from puna.cli import model_report

    loader_for = model_report.weights_loader

    def weights_loader(checkpoint: Any, config: Any, comm: Any, *rest: Any) -> Any:
        if comm.device.type in devices:
            raise ValueError(f"{comm.device.type} has no kernels for it")
        return loader_for(checkpoint, config, comm, *rest)

    monkeypatch.setattr(model_report, "weights_loader", weights_loader)
    monkeypatch.setattr(model_report, "usable_device", lambda device: torch.device("cuda"))
    report = json.loads(puna("info", random_model, "--json").out)
    assert report["ops_on_cuda"] == {}
    assert bool(report["ops_on_cpu"]) == report["supported"] == (devices == ("cuda",))
    assert report.get("problem") == (None if report["supported"] else "cpu has no kernels for it")
    assert "none: cuda has no kernels for it" in puna("info", random_model).out


def test_no_weight_is_read(puna: Run, random_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.checkpoints.hugging_face import HuggingFaceCheckpoint

    monkeypatch.setattr(HuggingFaceCheckpoint, "read", lambda *_: pytest.fail("a weight was read"))
    assert json.loads(puna("info", random_model, "--json").out)["supported"]


def test_unknown_field_is_a_warning_of_one_line(puna: Run, tmp_path: Path, random_model: Any) -> None:
    folder = Path(shutil.copytree(random_model.path, tmp_path / "model"))
    edit_config(folder, frobnicate=1)
    for words in (["info", folder], ["generate", "-m", folder, "the llama"]):
        done = puna(*words)
        assert done.code == 0
        assert done.err.startswith("puna: warning: ")
        assert "frobnicate" in done.err
        assert done.err.count("\n") == 1


def test_folder_without_config(puna: Run, tmp_path: Path) -> None:
    assert "config.json does not exist" in puna("info", tmp_path).message


def test_file_in_place_of_a_folder(puna: Run, random_model: Any) -> None:
    assert "give the folder that it is in" in puna("info", random_model.path / "config.json").message


def test_this_machine(puna: Run) -> None:
    machine = json.loads(puna("info", "--json").out)
    assert machine["puna"] == __version__
    assert machine["torch"] == torch.__version__
    assert machine["cpus"] >= 1
    assert machine["threads"] == torch.get_num_threads()
    assert isinstance(machine["compiled_kernels"], bool)
    if machine["compiled_kernels"] and Path("/proc/cpuinfo").is_file():
        flags = Path("/proc/cpuinfo").read_text().split()
        assert set(machine["cpu_features"]) <= set(flags)
    done = puna("info")
    assert [line.split("  ")[0] for line in done.out.splitlines()] == [
        *("puna", "python", "torch", "compiled kernels", "kernel level", "cpu features", "cpus", "threads"),
        "accelerators",
    ]
