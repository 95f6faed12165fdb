"""Engine directories: the model that they were built from, to the bit; shared pages; refusals; nothing half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from gguf_writer import random_blocks, write_gguf
from puna import ops
from puna.checkpoints import EngineDirectory, open_checkpoint
from puna.checkpoints.engine_directory import MANIFEST, WEIGHTS
from puna.config import read_json_object
from puna.engine.recommended_pooling import recommended_pooling
from puna.engine.tokenizer import Tokenizer
from puna.layers import pieces
from puna.llm import LLM
from puna.models import LLaMAForCausalLM, load_model, model_loader
from puna.scheduling.sampling_params import SamplingParams

Make = Callable[..., Any]
TOKENS = torch.tensor(((3, 14, 15, 9, 26, 53, 58), (66, 0, 1, 2, 4, 8, 16)))


def build(source: Path | str, target: Path, **options: Any) -> Path:
    model_loader(source, **options).build(target)
    return target


def logits(model: LLaMAForCausalLM) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS)
    assert found.isfinite().all()
    assert found.std() > 0.01
    return found


def same_parameters(a: LLaMAForCausalLM, b: LLaMAForCausalLM) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("quantization", ["bf16", "int8", "int4", "stored"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "hidden_size": 40, "intermediate_size": 33}),
        ("Qwen3ForCausalLM", {"head_dim": 10}),
        ("MixtralForCausalLM", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    ],
)
def test_the_built_model_is_the_loaded_one(
    quantization: str, architecture: str, options: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    folder = make(architecture, **options).path
    loaded = load_model(folder, quantization=quantization)
    mapped = load_model(build(folder, tmp_path / "engine", quantization=quantization))
    assert mapped.config == loaded.config
    assert mapped.generation_config == loaded.generation_config
    assert same_parameters(mapped, loaded)
    assert torch.equal(logits(mapped), logits(loaded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype: str, make: Make, tmp_path: Path) -> None:
    folder = make().path
    mapped = load_model(build(folder, tmp_path / "engine", dtype=dtype, quantization="int8"))
    loaded = load_model(folder, dtype, quantization="int8")
    assert mapped.config.dtype == dtype
    assert same_parameters(mapped, loaded)


def test_weights_of_several_formats(make: Make, tmp_path: Path) -> None:
    """A GGUF file whose tensors differ within a layer, as those of llama.cpp's mixtures do."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    folder = make(**sizes)
    kinds = {"attn_v": "Q6_K", "attn_output": "Q5_K", "ffn_down": "Q3_K", "ffn_up": "Q8_0"}
    shapes = {"attn_v": (128, 256), "attn_output": (256, 256), "ffn_down": (256, 256), "ffn_up": (256, 256)}
    replaced = {
        f"blk.{layer}.{part}.weight": (random_blocks(kind, *shapes[part], seed=layer), kind)
        for layer in range(2)
        for part, kind in kinds.items()
    }
    file = write_gguf(folder.path, tmp_path / "x.gguf", "Q4_0", replaced=replaced)
    loaded, target = load_model(file, quantization="stored"), build(file, tmp_path / "engine", quantization="stored")
    mapped = load_model(target)
    assert {"int8-16", "int8-min", "int4-16", "int8", "int4"} <= set(
        read_json_object(target / MANIFEST)["weight_formats"].values()
    )
    assert str(mapped) == str(loaded)
    assert same_parameters(mapped, loaded)
    assert torch.equal(logits(mapped), logits(loaded))


def test_the_file_is_a_safetensors_file_with_aligned_tensors(make: Make, tmp_path: Path) -> None:
    folder = make(attention_bias=True, hidden_size=40).path
    target = build(folder, tmp_path / "engine", quantization="int4", dtype="float32")
    model = load_model(target)
    with safe_open(target / WEIGHTS, "pt") as file:
        assert set(file.keys()) == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert torch.equal(file.get_tensor(name), parameter)
            assert parameter.data_ptr() % (64 if parameter.dtype == torch.uint8 else 4) == 0


def test_two_builds_are_the_same_bytes(make: Make, tmp_path: Path) -> None:
    folder = make().path
    first, second = (build(folder, tmp_path / name, quantization="int4") for name in "ab")
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()


@pytest.mark.parametrize("quantization", ["bf16", "int8", "int4", "stored"])
@pytest.mark.parametrize("options", [{"tie_word_embeddings": True, "hidden_size": 40}, {"attention_bias": True}])
def test_a_device_with_another_layout(
    quantization: str, options: dict[str, Any], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPUs want it: codes are the same bytes, and what the directory has in panels for the CPU becomes rows."""
    source = make(dtype=torch.bfloat16, **options).path
    target = build(source, tmp_path / "engine", quantization=quantization)
    on_host = load_model(target)
    monkeypatch.setattr(pieces, "dense_layout", lambda device: "panels" if device.index is None else "rows")
    monkeypatch.setattr(ops, "backends_for", lambda device: (ops.ReferenceBackend(),))
    loaded = load_model(target, device="cpu:0")
    for (name, piece), (_, wanted) in zip(loaded.pieces(), on_host.pieces(), strict=True):
        assert torch.equal(piece.read(), wanted.read()), name
    plain = [name for name, parameter in loaded.named_parameters() if parameter.dtype != torch.uint8]
    assert ("vocab_embedding.weight" in plain) == (quantization in ("bf16", "stored"))
    assert same_parameters(loaded, load_model(source, device="cpu:0", quantization=quantization))


def test_scales_of_the_cache_go_along(make: Make, tmp_path: Path) -> None:
    folder = make()
    scales = {f"model.layers.1.self_attn.{name}_scale": torch.tensor(2.0) for name in "kv"}
    folder.write(folder.tensors | scales)
    folder.change_config(
        quantization_config={
            "quant_method": "modelopt",
            "quant_algo": None,
            "kv_cache_quant_algo": "FP8",
        }
    )
    model = load_model(build(folder.path, tmp_path / "engine", quantization="bf16"))
    assert [layer.attention.cache_scales for layer in model.layers] == [(1.0, 1.0), (2.0, 2.0)]
    engine = open_checkpoint(tmp_path / "engine")
    assert engine.cache_scales == {1: (2.0, 2.0)}
    assert engine.cache_dtype == "fp8"
    manifest = json.loads((tmp_path / "engine" / "engine.json").read_text())
    del manifest["cache_dtype"]  # as in directories of versions that did not know it
    (tmp_path / "engine" / "engine.json").write_text(json.dumps(manifest))
    assert open_checkpoint(tmp_path / "engine").cache_dtype is None


def test_llm_with_text(make_with_tokenizer: Path, tmp_path: Path) -> None:
    target = build(make_with_tokenizer, tmp_path / "engine", quantization="int8")
    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(target, max_model_len=64) as llm:
        (output,) = llm.generate("abc", params)
    model = load_model(make_with_tokenizer, quantization="int8")
    ids = torch.tensor([output.prompt_token_ids])
    assert output.outputs[0].token_ids == model.generate(ids, max_new_tokens=8)[0, ids.shape[1] :].tolist()


def test_an_engine_that_the_kernels_can_not_run_is_refused(make_with_tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("puna._kernels", reason="without kernels the reference ops run everything")
    target = build(make_with_tokenizer, tmp_path / "engine", quantization="int8")
    with pytest.raises(ValueError, match=r"as the compiled kernels want them, but .* multiple of 16, not 8"):
        LLM(target, block_size=8)


@pytest.fixture
def make_with_tokenizer(make: Make, tmp_path: Path) -> Path:
    import tokenizers

    folder: Path = make(vocab_size=259, eos_token_id=1).path
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "ab"])}, [("a", "b")])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return folder


def test_tokenizer_of_a_folder(make_with_tokenizer: Path, tmp_path: Path) -> None:
    theirs = Tokenizer.from_pretrained(make_with_tokenizer)
    ours = Tokenizer.from_pretrained(build(make_with_tokenizer, tmp_path / "engine", quantization="int8"))
    messages = [{"role": "user", "content": "Über 3 </s> words"}]
    assert ours.encode_chat(messages) == theirs.encode_chat(messages)


def test_what_a_folder_says_of_embeddings_is_kept(make_with_tokenizer: Path, tmp_path: Path) -> None:
    (make_with_tokenizer / "1_Pooling").mkdir()
    (make_with_tokenizer / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert recommended_pooling(build(make_with_tokenizer, tmp_path / "engine", quantization="int8")) == "mean"


def test_tokenizer_of_a_gguf_file(make_with_tokenizer: Path, tmp_path: Path) -> None:
    values = {"tokenizer.chat_template": "{% for m in messages %}<{{ m.content }}>{% endfor %}"}
    file = write_gguf(make_with_tokenizer, tmp_path / "x.gguf", "Q8_0", metadata=values)
    theirs, target = Tokenizer.from_pretrained(file), build(file, tmp_path / "engine", quantization="stored")
    ours = Tokenizer.from_pretrained(target)
    messages = [{"role": "user", "content": "Über 3 </s> words"}]
    assert ours.encode_chat(messages) == theirs.encode_chat(messages)
    assert (ours.vocab_size, ours.bos_token_id, ours.special_ids) == (
        theirs.vocab_size,
        theirs.bos_token_id,
        theirs.special_ids,
    )
    assert open_checkpoint(target).generation_config == open_checkpoint(file).generation_config


def test_numbers_that_the_directory_does_not_hold_are_refused(make: Make, tmp_path: Path) -> None:
    target = build(make(dtype=torch.bfloat16).path, tmp_path / "engine", quantization="int8")
    assert load_model(target, "bfloat16", quantization="int8").config.quant == "int8"
    with pytest.raises(ValueError, match=r"built as int8.*can't be 'int4'.*puna build"):
        load_model(target, quantization="int4")
    with pytest.raises(ValueError, match=r"built for bfloat16.*can't be float32.*puna build"):
        load_model(target, torch.float32)
    with pytest.raises(ValueError, match="is an engine directory already"):
        build(target, tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "kind is 'other'"),
        ({"version": 2}, r"version is 2, and the format of engine directories .* is 1 .*puna build"),
        ({"byte_order": "big"}, r"byte_order is 'big'.*build it again"),
        ({"panel_layout": 999}, r"panel_layout is 999, and the layout of weights .*build it again"),
        ({"target": "cuda"}, "target is 'cuda'"),
        ({"files": {}}, "bytes"),
        ({"files": {WEIGHTS: 5}}, r"bytes, and engine.json says 5: copy it again"),
        ({"config": None}, "config is None"),
        ({"quantization": None}, "quantization is missing"),
        ({"weight_formats": {"model.layers.9.mlp.up_proj.weight": "int8"}}, "which the model lacks"),
        ({"weight_formats": {"model.layers.0.mlp.down_proj.weight": "int4"}}, r"proj.weight is .*the model needs"),
        ({"quantization": "int4"}, "the model needs"),
        ({"quantization": "int5"}, "'int5' is not known"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    target = build(make().path, tmp_path / "engine", quantization="int8")
    fields = read_json_object(target / MANIFEST)
    (target / MANIFEST).write_text(json.dumps({**fields, **changes}))
    with pytest.raises(ValueError, match=message):
        load_model(target)


def test_another_shape_is_refused(make: Make, tmp_path: Path) -> None:
    target = build(make().path, tmp_path / "engine", quantization="int8")
    fields = read_json_object(target / MANIFEST)
    for name, value in (
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 10**7),
        ("hidden_size", 64),
    ):
        (target / MANIFEST).write_text(json.dumps({**fields, "config": {**fields["config"], name: value}}))
        with pytest.raises(ValueError, match=r"lacks|does not use|the model needs|asks for 10000000 layers"):
            load_model(target)


def test_damaged_weights_are_refused(make: Make, tmp_path: Path) -> None:
    target = build(make().path, tmp_path / "engine", quantization="int8")
    whole = (target / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")

    def with_entry(**changes: Any) -> bytes:
        text = json.dumps({**header, first: {**header[first], **changes}}).encode()
        assert len(text) <= length
        return whole[:8] + text.ljust(length) + whole[8 + length :]

    for content in (
        whole[: len(whole) // 2],
        whole + b"x",
        b"\xff" * 8 + whole[8:],
        (17).to_bytes(8, "little") + whole[8:],
        whole[:8] + b"[" + whole[9:],
        with_entry(dtype="I3"),
        with_entry(shape=[-1]),
        with_entry(shape="x"),
        with_entry(data_offsets=[64, 65]),
        with_entry(data_offsets=None),
    ):
        (target / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match=r"copy it again, or build it again"):
            open_checkpoint(target)
    (target / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        open_checkpoint(target)


def test_writing_to_a_weight_leaves_the_file(make: Make, tmp_path: Path) -> None:
    target = build(make().path, tmp_path / "engine", quantization="int8")
    before = (target / WEIGHTS).read_bytes()
    model = load_model(target)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (target / WEIGHTS).read_bytes() == before
    assert logits(load_model(target)).std() > 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc/self/smaps here")
def test_loading_maps_the_file_and_copies_nothing(make: Make, tmp_path: Path) -> None:
    target = build(make(hidden_size=512, intermediate_size=512).path, tmp_path / "engine", quantization="int8")
    models = [load_model(target), load_model(target)]
    for model in models:
        _ = [parameter.sum() for parameter in model.parameters()]
    inode = (target / WEIGHTS).stat().st_ino
    sizes: list[dict[str, int]] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = len(words) > 4 and words[4] == str(inode)
            sizes += [{}] if inside else []
        elif inside and words[-1] == "kB":
            sizes[-1][words[0].rstrip(":")] = int(words[1]) * 1024
    assert len(sizes) == 2
    for size in sizes:  # the same pages in both maps, and none of them this process's own
        assert size["Rss"] > 0.9 * (target / WEIGHTS).stat().st_size
        assert size["Anonymous"] == size["Private_Dirty"] == 0
        assert size["Pss"] < 0.6 * size["Rss"]


def anonymous_bytes() -> int:
    """This process's memory that is no file's page."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status here")
def test_building_holds_one_tensor_at_a_time(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 256}
    loader = model_loader(make(dtype=torch.bfloat16, **sizes).path, quantization="int8")
    read, seen = loader.checkpoint.read, [anonymous_bytes()]

    def watched(name: str, source: tuple[slice, ...]) -> Tensor:
        seen.append(anonymous_bytes())
        return read(name, source)

    monkeypatch.setattr(loader.checkpoint, "read", watched)
    loader.build(tmp_path / "engine")
    assert (tmp_path / "engine" / WEIGHTS).stat().st_size > 50 * 2**20
    assert max(seen) - seen[0] < 25 * 2**20


def test_refuses_a_target_with_something_in_it(make: Make, tmp_path: Path) -> None:
    folder = make().path
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(ValueError, match="exists already"):
            build(folder, tmp_path / name, quantization="int8")
    assert isinstance(open_checkpoint(build(folder, tmp_path / "empty", quantization="int8")), EngineDirectory)
    assert build(folder, tmp_path / "deep" / "er", quantization="int8").is_dir()


def test_an_error_leaves_nothing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = model_loader(make().path, quantization="int8")

    def fail(*args: Any) -> Tensor:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loader.checkpoint, "read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.build(tmp_path / "out" / "engine")
    assert list((tmp_path / "out").iterdir()) == []


SLOW = """
import sys, time
from puna.checkpoints.hugging_face import HuggingFaceCheckpoint
from puna.models import model_loader
read, count = HuggingFaceCheckpoint.read, 0
def slow(self, name, source):
    global count
    count += 1
    if count == 5:
        print("in the middle", flush=True)
        time.sleep(60)
    return read(self, name, source)
HuggingFaceCheckpoint.read = slow
model_loader(sys.argv[1], quantization="int8").build(sys.argv[2])
"""


def test_a_killed_build_leaves_no_directory_and_the_next_one_tidies_up(make: Make, tmp_path: Path) -> None:
    folder, out = make().path, tmp_path / "out"
    processes = [
        subprocess.Popen([sys.executable, "-c", SLOW, folder, out / "engine"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "in the middle\n"
        assert len(list(out.iterdir())) == 2
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert not (out / "engine").exists()
        build(folder, out / "engine", quantization="int8")
        # What the killed one left is gone; that of the one that still runs is not.
        assert len(list(out.iterdir())) == 2
        load_model(out / "engine")
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_the_command(make_with_tokenizer: Path, tmp_path: Path) -> None:
    def puna(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "puna", *arguments], capture_output=True, text=True, check=False)

    target = tmp_path / "engine"
    done = puna("build", make_with_tokenizer, "--quantization", "int4", "-o", target)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_model(target).config.quant == "int4"
    again = puna("build", make_with_tokenizer, "-o", target)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    shown = puna("info", target, "--json")
    report = json.loads(shown.stdout)
    assert (report["supported"], report["weights"]) == (True, ["int4"])
    assert report["memory_bytes"]["total"] == sum(p.numel() * p.element_size() for p in load_model(target).parameters())
    said = puna("generate", "--model", target, "--max-new-tokens", "4", "--json", "abc")
    assert said.returncode == 0, said.stderr
    assert len(json.loads(said.stdout)["token_ids"]) >= 1
