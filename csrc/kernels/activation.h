// The activation functions of gated MLPs over 16 lanes, in float32: one code for the epilogue of linear layers and for the
// activation as an op of its own, so that both give the same bits, on all levels.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

// x * sigmoid(x), to within 4 units in the last place.
PUNA_INLINE F silu(F x) { return x / (broadcast(1.0f) + exp(zero() - x)); }

// x * Phi(x), Phi the normal distribution: with t = |x| / sqrt(2) that is max(x, 0) - |x| erfc(t) / 2, which loses no digits
// for negative x as 1 + erf would. erfc(t) = exp(-t^2) erfcx(t), and erfcx(t) / s is smooth in s = 1 / (1 + 0.4 t): the
// polynomial is a minimax fit of it for t in 0..9.5 (relative error 6e-8). Beyond that erfc is below 1e-38.
PUNA_INLINE F gelu(F x) {
  const F magnitude = min(broadcast(15.0f), abs(x));  // or infinity times zero would be NaN
  const F s = broadcast(1.0f) / fma(magnitude, broadcast(0.4f * 0.70710678118654752f), broadcast(1.0f));
  F p = broadcast(0.040267494f);
  p = fma(p, s, broadcast(-0.13547108f));
  p = fma(p, s, broadcast(0.073842116f));
  p = fma(p, s, broadcast(0.099729605f));
  p = fma(p, s, broadcast(0.071508296f));
  p = fma(p, s, broadcast(0.19696303f));
  p = fma(p, s, broadcast(0.20095858f));
  p = fma(p, s, broadcast(0.2265757f));
  p = fma(p, s, broadcast(0.2256263f));
  const F half_erfc = p * s * broadcast(0.5f) * exp(magnitude * magnitude * broadcast(-0.5f));
  return fma(zero() - magnitude, half_erfc, max(zero(), x));
}

// x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
PUNA_INLINE F gelu_tanh(F x) {
  const F cubic = fma(x * x, broadcast(0.044715f), broadcast(1.0f)) * x;
  return x / (broadcast(1.0f) + exp(cubic * broadcast(-2 * 0.79788456080286536f)));
}

PUNA_INLINE F activate(F x, Activation activation) {
  switch (activation) {
    case Activation::silu: return silu(x);
    case Activation::gelu: return gelu(x);
    case Activation::gelu_tanh: return gelu_tanh(x);
    case Activation::relu: return max(zero(), x);  // the second operand where x is NaN: NaN stays
    case Activation::none: break;
  }
  return x;
}

}  // namespace puna::PUNA_LEVEL
