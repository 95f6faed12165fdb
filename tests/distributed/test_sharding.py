"""Ranks that each load their own slice give the logits of the whole model together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from puna.checkpoints import open_checkpoint
from puna.config import LLaMAConfig
from puna.distributed import Communicator, NullCommunicator, TorchCommunicator
from puna.layers.params import KeyValueCacheParams
from puna.mapping import Mapping
from puna.models import MODELS, LLaMAForCausalLM, load_model
from puna.models.loading import save_model
from puna.runtime.kv_pool import KVPool
from puna.runtime.step_buffers import StepBuffers
from puna.scheduling.step_plan import StepPlan, StepRow

SMALL: dict[str, Any] = {
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "hidden_size": 24,
    "mlp_hidden_size": 44,
    "vocab_size": 53,
    "max_position_embeddings": 64,
}
MODELS_TO_SHARD: dict[str, dict[str, Any]] = {
    "llama": {"attn_bias": True, "attn_output_bias": True, "mlp_bias": True},
    "llama_tied_mqa": {"tie_embeddings": True, "num_kv_heads": 1},
    "llama_tiny_vocab": {"vocab_size": 5},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 6},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "attn_bias": True, "tie_embeddings": True},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qk_norm": True},
    "mixtral": {"architecture": "MixtralForCausalLM", "num_experts": 4, "experts_per_token": 2},
}


class Hub:
    """Where the threads that play the ranks meet: a mailbox for each pair, and the pieces of a collective call."""

    def __init__(self, world_size: int) -> None:
        self.mail: dict[tuple[int, int], Queue[Tensor]] = {
            (a, b): Queue() for a in range(world_size) for b in range(world_size)
        }


@dataclass
class ThreadCommunicator:
    """A communicator between threads."""

    hub: Hub
    mapping: Mapping
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        for other in self.mapping.tp_group:
            self.hub.mail[self.mapping.rank, other].put(tensor.clone())
        return [self.hub.mail[other, self.mapping.rank].get(timeout=30) for other in self.mapping.tp_group]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._exchange(tensor), dim=-1)

    def send(self, tensor: Tensor, rank: int) -> None:
        self.hub.mail[self.mapping.rank, rank].put(tensor.clone())

    def recv(self, tensor: Tensor, rank: int) -> Tensor:
        return tensor.copy_(self.hub.mail[rank, self.mapping.rank].get(timeout=30))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random checkpoint, by the name of its options."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            config = LLaMAConfig(**(SMALL | MODELS_TO_SHARD[name]))
            torch.manual_seed(7)
            model = MODELS[config.architecture](config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(std=0.3)
            made[name] = tmp_path_factory.mktemp(name)
            save_model(model, made[name])
        return made[name]

    return make


def run_ranks(tp_size: int, pp_size: int, work: Callable[[ThreadCommunicator], Any]) -> list[Any]:
    """Runs `work` once for each rank, all at the same time."""
    world_size = tp_size * pp_size
    hub = Hub(world_size)
    comms = [
        ThreadCommunicator(hub, Mapping(tp_size=tp_size, pp_size=pp_size, rank=rank)) for rank in range(world_size)
    ]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, comms))


def dense_logits(model: LLaMAForCausalLM, tokens: Tensor, comm: Communicator) -> Tensor | None:
    """The logits on the last stage; other stages pass hidden states on. Half of the tokens come from the cache."""
    cache, parts = None, []
    for chunk in tokens.chunk(2, dim=1):
        hidden = None
        if not comm.mapping.is_first_pp_rank():
            shape = (*chunk.shape, model.config.hidden_size)
            hidden = comm.recv(torch.empty(shape), comm.mapping.prev_pp_rank())
        with torch.no_grad():
            output, presents = model(chunk, use_cache=True, kv_cache_params=cache, hidden_states=hidden)
        cache = KeyValueCacheParams(past_key_value=presents)
        if comm.mapping.is_last_pp_rank():
            parts.append(output)
        else:
            comm.send(output, comm.mapping.next_pp_rank())
    return torch.cat(parts, dim=1) if parts else None


TOKENS = torch.randint(0, 5, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS_TO_SHARD)
@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_logits_of_all_ranks_together(name: str, tp_size: int, pp_size: int, folder_of: Callable[[str], Path]) -> None:
    with torch.no_grad():
        expected = load_model(folder_of(name))(TOKENS)

    def work(comm: ThreadCommunicator) -> Tensor | None:
        return dense_logits(load_model(folder_of(name), comm=comm), TOKENS, comm)

    results = run_ranks(tp_size, pp_size, work)
    assert [result is not None for result in results] == [False] * tp_size * (pp_size - 1) + [True] * tp_size
    for result in results[-tp_size:]:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied_mqa", "mixtral"])
def test_packed_tokens_on_two_ranks(name: str, folder_of: Callable[[str], Path]) -> None:
    rows = [
        StepRow(0, 0, (1, 2, 3, 4, 0), block_ids=((2, 0),), prompt_length=5, sampled_ids=(0,)),
        StepRow(1, 0, (4, 4), block_ids=((1,),), prompt_length=2, sampled_ids=(1,)),
    ]
    inputs = StepBuffers(8, 2, 2, block_size=4).fill(StepPlan(tuple(rows)))

    def run(model: LLaMAForCausalLM, comm: Communicator) -> Tensor:
        pool = KVPool(model.config, comm, (3,), block_size=4)
        with torch.no_grad():
            return model(
                inputs.input_ids,
                inputs.position_ids,
                last_token_ids=inputs.logits_ids,
                kv_cache_params=pool.params(),
                attention_params=inputs.attention_params,
            )

    expected = run(load_model(folder_of(name)), NullCommunicator())
    assert expected.shape[0] == 2
    for result in run_ranks(2, 1, lambda comm: run(load_model(folder_of(name), comm=comm), comm)):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_rank_reads_no_more_than_its_slice(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the elements read: half of every matrix with tp_size 2, the stage's layers with pp_size 2."""
    checkpoint = open_checkpoint(folder_of("llama"))
    original = type(checkpoint).read
    counts: dict[str, int] = {}

    def counting_read(self: Any, name: str, source: tuple[slice, ...]) -> Tensor:
        tensor = original(self, name, source)
        counts[name] = tensor.numel()
        return tensor

    monkeypatch.setattr(type(checkpoint), "read", counting_read)

    def read_by(mapping: Mapping) -> dict[str, int]:
        counts.clear()
        load_model(folder_of("llama"), comm=ThreadCommunicator(Hub(2), mapping))
        return dict(counts)

    def size(name: str) -> int:
        return torch.Size(checkpoint.shape(name)).numel()

    for read in (read_by(Mapping(tp_size=2, rank=rank)) for rank in range(2)):
        assert read.keys() == set(checkpoint.names)
        for name, count in read.items():
            if name in ("model.embed_tokens.weight", "lm_head.weight"):  # 53 rows: 27 and 26
                assert count in (27 * 24, 26 * 24)
            else:
                whole = name.endswith(("norm.weight", "o_proj.bias", "down_proj.bias"))
                assert count == size(name) // (1 if whole else 2), name

    first, second = (read_by(Mapping(pp_size=2, rank=rank)) for rank in range(2))
    assert not first.keys() & second.keys()
    assert first.keys() | second.keys() == set(checkpoint.names)
    assert {name.split(".")[2] for name in first if "layers" in name} == {"0", "1"}
    assert {name.split(".")[2] for name in second if "layers" in name} == {"2"}
    assert "model.embed_tokens.weight" in first
    assert {"model.norm.weight", "lm_head.weight"} <= second.keys()


@pytest.mark.parametrize(
    ("options", "tp_size", "words"),
    [
        ({"num_heads": 3, "num_kv_heads": 3}, 2, "it must divide the 3 attention heads"),
        ({"num_heads": 6, "num_kv_heads": 2}, 3, "choose a tp_size that divides 2"),
        ({"mlp_hidden_size": 45}, 2, "choose a tp_size that divides 45"),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, Any], tp_size: int, words: str) -> None:
    config = LLaMAConfig(**(SMALL | options))
    comm = ThreadCommunicator(Hub(1), Mapping(tp_size=tp_size))
    with pytest.raises(ValueError, match=words):
        MODELS["LlamaForCausalLM"](config, comm)


def test_generation_on_two_ranks(folder_of: Callable[[str], Path]) -> None:
    expected = load_model(folder_of("llama")).generate(TOKENS, max_new_tokens=20)
    for result in run_ranks(2, 1, lambda c: load_model(folder_of("llama"), comm=c).generate(TOKENS, max_new_tokens=20)):
        assert torch.equal(result, expected)
    with pytest.raises(ValueError, match="load with pp_size 1"):
        run_ranks(1, 2, lambda c: load_model(folder_of("llama"), comm=c).generate(TOKENS, max_new_tokens=2))


def _gloo_rank(rank: int, tp_size: int, pp_size: int, folder: str, store: str) -> None:
    torch.set_num_threads(1)
    world_size = tp_size * pp_size
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        mapping = Mapping(tp_size=tp_size, pp_size=pp_size, rank=rank)
        model = load_model(folder, mapping=mapping)
        assert isinstance(model.comm, TorchCommunicator)
        result = dense_logits(model, TOKENS, model.comm)
        if result is not None:
            with torch.no_grad():
                torch.testing.assert_close(result, load_model(folder)(TOKENS), rtol=1e-4, atol=1e-5)
        else:
            assert not mapping.is_last_pp_rank()
        with pytest.raises(ValueError, match="the process group has 2 ranks"):
            TorchCommunicator(Mapping(tp_size=3, rank=rank))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2)])
def test_two_gloo_processes(tp_size: int, pp_size: int, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = (tp_size, pp_size, str(folder_of("llama")), str(tmp_path / "store"))
    torch.multiprocessing.spawn(_gloo_rank, arguments, nprocs=2)


def test_a_rank_alone_has_nobody_to_talk_to() -> None:
    comm, tensor = NullCommunicator(), torch.ones(2)
    assert comm.all_reduce(tensor) is tensor
    assert comm.all_gather(tensor) is tensor
    with pytest.raises(ValueError, match="cannot send to rank 1"):
        comm.send(tensor, 1)
    with pytest.raises(ValueError, match="cannot receive from rank 1"):
        comm.recv(tensor, 1)
