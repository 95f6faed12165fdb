"""GenerationMixin: plain generation on the dense path, greedy, sampled and with beams; the oracle for the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from puna.layers.params import KeyValueCacheParams
from puna.models import logits as choose

if TYPE_CHECKING:
    from puna.config import GenerationConfig, LLaMAConfig
    from puna.distributed import Communicator
    from puna.layers.attention import Present


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What `generate` may be told. Raises ValueError for values outside of their range.

    temperature 0 means greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 mean off. `seed` makes a sampled run
    repeatable. eos_token_id and pad_token_id default to the checkpoint's; an empty eos_token_id never stops. The last
    four belong to beam search (num_beams above 1): a finished beam's score is its log-probability divided by
    length ** length_penalty; early_stopping True ends a prompt when it has num_beams finished ones, False when a better
    one is unlikely, "never" when it is impossible.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "in 0..1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("num_return_sequences", 1 <= self.num_return_sequences <= self.num_beams, "in 1..num_beams"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
        )
        for name, holds, wanted in ranges:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {wanted}")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("beam search does not sample: leave temperature at 0, or num_beams at 1")


class GenerationMixin:
    """`generate` and `stream` for a causal language model that is whole on this rank or split by tensors only."""

    config: LLaMAConfig
    generation_config: GenerationConfig
    comm: Communicator

    if TYPE_CHECKING:  # what the model brings

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continues each row of input_ids int64 [B, S]; see GenerationOptions for the options.

        attention_mask [B, S] is 1 where a token is real; rows may be padded on either side. Returns the rows with what
        was generated after them, [B * num_return_sequences, S + generated], finished rows filled with the pad token;
        the best sequences of a prompt stand together, best first.

        Raises ValueError for an option out of range, an empty row, or more tokens than the context holds.
        """
        settings = self._settings(input_ids, attention_mask, options)
        if settings.num_beams == 1:
            return torch.cat(
                (input_ids, *(step[:, None] for step in self._steps(input_ids, attention_mask, settings))), 1
            )
        prompts = _unpadded(input_ids, attention_mask)
        found = [sequence for prompt in prompts for sequence in self._beam_search(prompt, settings)]
        new = torch.full((len(found), max(map(len, found))), self._pad_token(settings), device=input_ids.device)
        for row, sequence in zip(new, found, strict=True):
            row[: len(sequence)] = sequence
        return torch.cat((input_ids.repeat_interleave(settings.num_return_sequences, dim=0), new), dim=1)

    def stream(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """The same step by step, without beams: yields the next token of each row, [B], as soon as it is chosen."""
        settings = self._settings(input_ids, attention_mask, options)
        if settings.num_beams > 1:
            raise ValueError(f"num_beams is {settings.num_beams}: beams can't be streamed, use generate")
        return self._steps(input_ids, attention_mask, settings)

    @torch.inference_mode()
    def _steps(self, input_ids: Tensor, attention_mask: Tensor | None, settings: GenerationOptions) -> Iterator[Tensor]:
        tokens, mask = _left_padded(input_ids, attention_mask)
        generator = None
        if settings.seed is not None:
            generator = torch.Generator(tokens.device).manual_seed(settings.seed)
        eos = torch.tensor(self._eos_tokens(settings), device=tokens.device, dtype=torch.long)
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        is_padded = not bool(mask.all())
        presents: list[Present] | None = None
        for _ in range(settings.max_new_tokens):
            logits, presents = self._next_logits(tokens, mask if is_padded else None, presents)
            if settings.repetition_penalty != 1:
                logits = choose.penalize_repetition(logits, tokens, mask, settings.repetition_penalty)
            chosen = _choose(logits, settings, generator)
            chosen = torch.where(finished, self._pad_token(settings), chosen)
            finished = finished | torch.isin(chosen, eos)
            yield chosen
            if finished.all():
                return
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)

    @torch.inference_mode()
    def _beam_search(self, prompt: Tensor, settings: GenerationOptions) -> list[Tensor]:
        """The best continuations of prompt [S], best first, each [generated]; the rules are those of transformers."""
        beams, eos = (
            settings.num_beams,
            torch.tensor(self._eos_tokens(settings), device=prompt.device, dtype=torch.long),
        )
        running = prompt.repeat(beams, 1)
        # Only the first beam counts at the start: the others are copies of it and would give the same continuations.
        scores = torch.full((beams,), -1e9, device=prompt.device)
        scores[0] = 0.0
        finished: list[tuple[float, Tensor]] = []
        presents: list[Present] | None = None
        for length in range(1, settings.max_new_tokens + 1):
            logits, presents = self._next_logits(running, None, presents)
            log_probs = logits.log_softmax(dim=-1)
            if settings.repetition_penalty != 1:
                all_real = torch.ones_like(running, dtype=torch.bool)
                log_probs = choose.penalize_repetition(log_probs, running, all_real, settings.repetition_penalty)
            vocab_size = log_probs.shape[-1]
            # Enough candidates that `beams` of them go on even if every beam may end in each of the eos tokens.
            candidates = min(max(2, 1 + len(eos)) * beams, beams * vocab_size)
            top, places = (log_probs + scores[:, None]).flatten().topk(candidates)
            parents, tokens = places // vocab_size, places % vocab_size
            ends = (
                torch.isin(tokens, eos)
                if length < settings.max_new_tokens
                else torch.ones_like(tokens, dtype=torch.bool)
            )

            # Only the best `beams` candidates may finish; the rest are there to go on in their place.
            for candidate in torch.nonzero(ends[:beams]).flatten().tolist():
                sequence = torch.cat((running[parents[candidate], len(prompt) :], tokens[candidate, None]))
                finished.append((float(top[candidate] / length**settings.length_penalty), sequence))
            # Python's sort is stable: of equal scores the earlier one stays first.
            finished = sorted(finished, key=lambda scored: -scored[0])[:beams]
            going_on = torch.nonzero(~ends).flatten()[:beams]
            if len(going_on) == 0 or _beams_are_done(finished, float(top[going_on[0]]), length, settings):
                break
            if len(going_on) < beams:  # a vocabulary smaller than the number of beams: fill up with dead ones
                going_on = torch.cat((going_on, going_on[:1].expand(beams - len(going_on))))
            scores = top[going_on]
            running = torch.cat((running[parents[going_on]], tokens[going_on, None]), dim=1)
            presents = [(key[parents[going_on]], value[parents[going_on]]) for key, value in presents]
        return [sequence for _, sequence in finished[: settings.num_return_sequences]]

    def _next_logits(
        self, tokens: Tensor, mask: Tensor | None, presents: list[Present] | None
    ) -> tuple[Tensor, list[Present]]:
        """float32 logits [B, V] of what follows tokens [B, L], of which all but the last are in `presents` if given."""
        cache = None if presents is None else KeyValueCacheParams(past_key_value=presents)
        new = tokens if presents is None else tokens[:, -1:]
        last = torch.full((len(tokens),), new.shape[1] - 1, device=tokens.device)
        logits, presents = self(new, attention_mask=mask, use_cache=True, last_token_ids=last, kv_cache_params=cache)
        return logits.float(), presents

    def _settings(self, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> GenerationOptions:
        known = GenerationOptions.__dataclass_fields__
        for name in options:
            if name not in known:
                raise ValueError(f"{name} is not an option of generate: use {', '.join(known)}")
        settings = GenerationOptions(**options)
        if self.comm.mapping.pp_size > 1:
            raise ValueError("generate needs the whole stack of layers on this rank: load with pp_size 1")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has the shape {tuple(input_ids.shape)}: it must be [batch, at least one token]"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}: it must be that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.long().sum(dim=1).max())
        if attention_mask is not None and not bool(attention_mask.bool().any(dim=1).all()):
            raise ValueError("attention_mask has a row without a real token: every prompt needs one")
        room = self.config.context_length - longest
        if settings.max_new_tokens > room:
            raise ValueError(
                f"the prompt of {longest} tokens and max_new_tokens={settings.max_new_tokens} exceed the context of "
                f"{self.config.context_length}: shorten the prompt or ask for at most {max(room, 0)} tokens"
            )
        return settings

    def _eos_tokens(self, settings: GenerationOptions) -> list[int]:
        if settings.eos_token_id is None:
            return list(self.generation_config.eos_token_ids)
        return [settings.eos_token_id] if isinstance(settings.eos_token_id, int) else list(settings.eos_token_id)

    def _pad_token(self, settings: GenerationOptions) -> int:
        for pad in (settings.pad_token_id, self.generation_config.pad_token_id, *self._eos_tokens(settings)):
            if pad is not None:
                return pad
        return 0


def _choose(logits: Tensor, settings: GenerationOptions, generator: torch.Generator | None) -> Tensor:
    """The next token of each row of logits [B, V] -> [B]."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = choose.keep_top_k(logits / settings.temperature, settings.top_k)
    logits = choose.keep_min_p(choose.keep_top_p(logits, settings.top_p), settings.min_p)
    return choose.draw(logits, generator)


def _beams_are_done(
    finished: list[tuple[float, Tensor]], best_running: float, length: int, settings: GenerationOptions
) -> bool:
    """Whether no running beam can, or is likely to, take the place of a finished one."""
    if len(finished) < settings.num_beams:
        return False
    if settings.early_stopping is True:
        return True
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = settings.max_new_tokens
    worst_finished, _ = finished[-1]
    return bool(best_running / length**settings.length_penalty <= worst_finished)


def _left_padded(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Moves each row's padding to its front: new tokens then follow the prompt. -> tokens [B, S], bool mask [B, S]"""
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    order = mask.int().argsort(dim=1, stable=True)
    return tokens.gather(1, order), mask.gather(1, order)


def _unpadded(tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    return list(tokens) if mask is None else [row[real] for row, real in zip(tokens, mask.bool(), strict=True)]
