"""How much Hopper's sums of FP8 products lose, simulated on the CPU: nothing here runs on a GPU.

The tensor cores are taken to work as measurements describe them (DeepSeek-V3's report, 2024, section 3.5.2): of each 32
products and the sum so far, all are cut off 13 bits below the largest one's exponent. Prints, for sums as long as an 8B
model's, the error that this leaves, of the result's root mean square, beside what rounding to FP8 has left before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.ops import reference
from puna.ops.scaled import FP8, FP8_MAX, InputScaling

STEP = 32
KEPT_BITS = 13


def summed(x: Tensor, weight: Tensor, promoted_every: int | None) -> Tensor:
    """x [T, K] @ weight [N, K] transposed as the tensor cores do it; sums go to float64 every so many products."""
    kept = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    running = torch.zeros_like(kept)
    for k in range(0, x.shape[1], STEP):
        products = (x[:, None, k : k + STEP] * weight[None, :, k : k + STEP]).double()
        addends = torch.cat((products, running[..., None]), dim=-1)
        exponent = addends.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor()
        unit = torch.exp2(exponent - KEPT_BITS)
        running = (torch.trunc(addends / unit) * unit).sum(-1)
        if promoted_every is not None and (k + STEP) % promoted_every == 0:
            kept, running = kept + running, torch.zeros_like(running)
    return kept + running


def main() -> None:
    torch.manual_seed(0)
    for inputs in (4096, 14336):
        x, weight = torch.randn(16, inputs), torch.randn(48, inputs)
        rows = reference.quantize_rows(x, InputScaling())
        scales = weight.abs().amax(1, keepdim=True) / FP8_MAX
        values = (weight / scales).to(FP8)
        factors = rows.scales.double() * scales.t().double()
        unrounded = x.double() @ weight.double().t()
        exact = rows.values.double() @ values.double().t()
        size = unrounded.square().mean().sqrt()

        def of_size(error: Tensor, size: Tensor = size) -> str:
            return f"{100 * (error.square().mean().sqrt() / size).item():.3f} %"

        parts = [f"rounding to FP8 {of_size(exact * factors - unrounded)}"]
        for name, every in (("fast accumulation", None), ("sums of 128", 128), ("sums of 256", 256)):
            error = summed(rows.values.float(), values.float(), every) - exact
            parts.append(f"{name} {of_size(error * factors)}")
        print(f"K = {inputs}: {', '.join(parts)}")


if __name__ == "__main__":
    main()
