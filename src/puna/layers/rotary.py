"""RotaryEmbedding: the angle by which each pair of a head's channels is rotated at a position.

Sources: the embedding itself, Su et al. 2021 (RoFormer); linear scaling, Chen et al. 2023 (positional interpolation);
dynamic, the "NTK-aware" scaling by bloc97 and emozilla; yarn, Peng et al. 2023; llama3, Meta's Llama 3.1 reference
code; longrope, Ding et al. 2024. The float32 operations are in the order in which Hugging Face's do them: at position
4,000 a difference in the last bit of a frequency is an angle of 2e-4, which shows in the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from puna.config import LLaMAConfig, RotaryScaling


class RotaryEmbedding(nn.Module):
    """Positions to angles: cosines and sines for the D / 2 pairs of a head.

    The frequencies are plain attributes and not buffers: a cast of the model to bfloat16 must not round them, and
    building on the meta device must not lose them.
    """

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.base = config.rotary_base
        self.head_size = config.head_size
        self.max_position_embeddings = config.max_position_embeddings
        self.scaling = config.rotary_scaling
        self.attention_factor = _attention_factor(config)
        with torch.device("cpu"):
            self._inv_freq, self._long_inv_freq = _inverse_frequencies(config)
            self._exponents = _exponents(self.head_size)

    @property
    def depends_on_length(self) -> bool:
        """Whether the angle of a position also depends on the length of its sequence."""
        return self.scaling is not None and self.scaling.type in ("dynamic", "longrope")

    def forward(self, position_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """position_ids [...] -> cosines and sines, each float32 [..., D / 2], scaled by the attention factor.

        `lengths`, of a shape that broadcasts to that of `position_ids`, is the length of each token's sequence, by
        which dynamic and longrope choose their frequencies; it must be given for these two.
        """
        if self._inv_freq.device != position_ids.device:
            self._inv_freq = self._inv_freq.to(position_ids.device)
            self._long_inv_freq = self._long_inv_freq.to(position_ids.device)
            self._exponents = self._exponents.to(position_ids.device)
        inv_freq = self._inv_freq
        if self.scaling is not None and self.scaling.type == "dynamic":
            inv_freq = self._dynamic_inverse_frequencies(_required(lengths), self.scaling)
        elif self.scaling is not None and self.scaling.type == "longrope":
            original = self.scaling.original_max_position_embeddings or self.max_position_embeddings
            is_long = (_required(lengths) > original).unsqueeze(-1)
            inv_freq = torch.where(is_long, self._long_inv_freq, self._inv_freq)
        angles = position_ids.unsqueeze(-1).float() * inv_freq
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _dynamic_inverse_frequencies(self, lengths: Tensor, scaling: RotaryScaling) -> Tensor:
        """[...] sequence lengths -> [..., D / 2]: the base grows with the length past the trained one."""
        factor, size = scaling.factor or 1.0, self.head_size
        stretch = factor * lengths.clamp(min=self.max_position_embeddings) / self.max_position_embeddings - (factor - 1)
        base = self.base * stretch ** (size / (size - 2))
        return 1.0 / (base.unsqueeze(-1) ** self._exponents)


def _required(lengths: Tensor | None) -> Tensor:
    if lengths is None:
        raise ValueError("this model's rotary embedding depends on the sequence length: pass `lengths`")
    return lengths


def _exponents(head_size: int) -> Tensor:
    return torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size


def _inverse_frequencies(config: LLaMAConfig) -> tuple[Tensor, Tensor]:
    """The frequencies [D / 2] in radians a position, and those for long sequences, which differ in longrope only."""
    scaling, base, size = config.rotary_scaling, config.rotary_base, config.head_size
    inv_freq = 1.0 / (base ** _exponents(size))
    if scaling is None or scaling.type == "dynamic":
        return inv_freq, inv_freq
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    if scaling.type == "longrope":
        short, long = (
            1.0 / (torch.tensor(factors, dtype=torch.float32) * base ** _exponents(size))
            for factors in (scaling.short_factor, scaling.long_factor)
        )
        return short, long
    factor = scaling.factor or config.max_position_embeddings / original
    if scaling.type == "linear":
        inv_freq = inv_freq / factor
    elif scaling.type == "llama3":
        inv_freq = _llama3(inv_freq, factor, original, scaling)
    elif scaling.type == "yarn":
        inv_freq = _yarn(base, size, factor, original, scaling)
    return inv_freq, inv_freq


def _llama3(inv_freq: Tensor, factor: float, original: int, scaling: RotaryScaling) -> Tensor:
    """Divides the low frequencies by `factor`, keeps the high ones, and goes smoothly from one to the other between."""
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, between)
    return torch.where(wavelength < original / high, inv_freq, scaled)


def _yarn(base: float, size: int, factor: float, original: int, scaling: RotaryScaling) -> Tensor:
    """Interpolates the pairs that turn seldom over the trained context, and keeps those that turn often."""

    def pair_with(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    powers = base ** (torch.arange(0, size, 2).float() / size)
    kept = 1 - ramp
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept


def _attention_factor(config: LLaMAConfig) -> float:
    """What cosines and sines are multiplied with, so that attention stays as sharp in the longer context."""
    scaling = config.rotary_scaling
    if scaling is None or scaling.type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    factor = scaling.factor or config.max_position_embeddings / original
    if scaling.type == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
