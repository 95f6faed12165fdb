// Norm, sums, gated activations, rotary embedding: everything that goes over tokens once.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

inline void rms_norm(const RmsNormArgs&, Worker&) {}
inline void add(const AddArgs&, Worker&) {}
inline void gated_activation(const GatedActivationArgs&, Worker&) {}
inline void rotary(const RotaryArgs&, Worker&) {}

}  // namespace puna::PUNA_LEVEL
