"""Two models' predictions side by side: KL divergence, agreement and log-probabilities, over whole distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from puna.engine.tokenizer import Tokenizer
from puna.evaluation.windows import sliding_windows
from puna.models.llama import LLaMAForCausalLM, LLaMAModel

# Of one model's float64 log-probabilities that exist at once: 32 MiB.
_MAX_ELEMENTS: Final = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """For each of N predicted tokens: KL(A || B) in nats, whether both find the same token likeliest (bool), and -ln p
    of the token itself under A and B. All [N], in float64 but for `agrees`, in the order of the texts.
    """

    kl: Tensor
    agrees: Tensor
    nats_a: Tensor
    nats_b: Tensor

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    def kl_quantile(self, q: float) -> float:
        """Between the two values around it, linearly."""
        ordered = self.kl.sort().values  # torch.quantile takes no more than 16 million values
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))

    @property
    def agreement(self) -> float:
        """The share of tokens, in 0..1."""
        return float(self.agrees.double().mean())

    @property
    def perplexity_a(self) -> float:
        return float(self.nats_a.mean().exp())

    @property
    def perplexity_b(self) -> float:
        return float(self.nats_b.mean().exp())

    @property
    def perplexity_ratio(self) -> float:
        """B's over A's: above 1 where B predicts worse."""
        return float((self.nats_b.mean() - self.nats_a.mean()).exp())


def encode_for_both(a: Tokenizer, b: Tokenizer, documents: Sequence[str]) -> list[list[int]]:
    """The documents as token ids. Raises ValueError unless both tokenizers have the same tokens and agree on these."""
    if a.vocab_size != b.vocab_size:
        raise ValueError(
            f"the tokenizers have {a.vocab_size} and {b.vocab_size} tokens: only models with the same tokenizer can be "
            "compared"
        )
    for token_id in range(a.vocab_size):
        if a.id_to_token(token_id) != b.id_to_token(token_id):
            raise ValueError(
                f"token {token_id} is {a.id_to_token(token_id)!r} to one tokenizer and {b.id_to_token(token_id)!r} to "
                "the other: only models with the same tokenizer can be compared"
            )
    encoded = [a.encode(document) for document in documents]
    if encoded != [b.encode(document) for document in documents]:
        raise ValueError("the tokenizers cut the text differently: only models with the same one can be compared")
    return encoded


@torch.inference_mode()
def compare_models(
    a: LLaMAForCausalLM,
    b: LLaMAForCausalLM,
    encoded: Sequence[Sequence[int]],
    context: int,
    stride: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Both models' distributions for every token but the first of each text, in windows of `context` tokens.

    The models run on their dense path; what they give is compared in float64. `on_progress` is called with the tokens
    done and all there are. Raises ValueError for vocabularies of different sizes, a context or stride out of range, and
    texts without a token to predict.
    """
    sizes = a.config.vocab_size, b.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models predict {sizes[0]} and {sizes[1]} tokens: they can't be compared")
    total = sum(max(0, len(token_ids) - 1) for token_ids in encoded)
    if total == 0:
        raise ValueError("the text has no token to predict: it needs at least two")
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    for token_ids in encoded:
        for window in sliding_windows(token_ids, context, stride):
            inputs = torch.tensor([window.token_ids[:-1]])
            targets = torch.tensor(window.token_ids[-window.num_scored :])
            hidden = [_hidden_states(model, inputs)[-window.num_scored :] for model in (a, b)]
            rows = max(1, _MAX_ELEMENTS // sizes[0])
            for some_a, some_b, some_targets in zip(*(torch.split(x, rows) for x in (*hidden, targets)), strict=True):
                parts.append(_compared(_log_probs(a, some_a), _log_probs(b, some_b), some_targets))
            done += window.num_scored
            if on_progress is not None:
                on_progress(done, total)
    kl, agrees, nats_a, nats_b = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Comparison(kl=kl, agrees=agrees, nats_a=nats_a, nats_b=nats_b)


def _hidden_states(model: LLaMAForCausalLM, inputs: Tensor) -> Tensor:
    """[1, S] -> [S, E]. Not the logits of all tokens, which for a large vocabulary would take gigabytes."""
    hidden = LLaMAModel.forward(model, inputs.to(model.comm.device))
    return hidden[0]


def _log_probs(model: LLaMAForCausalLM, hidden: Tensor) -> Tensor:
    """[R, E] -> float64 [R, V] on the CPU."""
    if model.lm_head is None:
        raise ValueError("this model is a part of one: load it without a mapping to compare it")
    logits: Tensor = model.lm_head(hidden)
    return logits.cpu().double().log_softmax(dim=-1)


def _compared(log_p: Tensor, log_q: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """KL [R], agreement [R], and -ln p of the targets [R] in either distribution [R, V]."""
    # Rounding may leave the sum a little below 0, which no divergence is.
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0)
    agrees = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
    nats = [-log.gather(1, targets[:, None])[:, 0] for log in (log_p, log_q)]
    return kl, agrees, *nats
