// The table of one level's kernels: what each file in csrc/levels compiles.
#pragma once

#include "argmax.h"
#include "attention.h"
#include "draw.h"
#include "elementwise.h"
#include "embedding.h"
#include "experts.h"
#include "linear.h"
#include "probe.h"
#include "rounding.h"

#define PUNA_STRING(name) #name
#define PUNA_NAME(name) PUNA_STRING(name)

namespace puna::PUNA_LEVEL {

// A typed kernel as the pool calls it.
template <class Args, void (*function)(const Args&, Worker&)>
void untyped(const void* args, Worker& worker) {
  function(*static_cast<const Args*>(args), worker);
}

extern const Kernels kKernels;
const Kernels kKernels = {
    .level = PUNA_NAME(PUNA_LEVEL),
    .linear = untyped<LinearArgs, linear>,
    .embedding = untyped<EmbeddingArgs, embedding>,
    .rms_norm = untyped<RmsNormArgs, rms_norm>,
    .add = untyped<AddArgs, add>,
    .gated_activation = untyped<GatedActivationArgs, gated_activation>,
    .rotary = untyped<RotaryArgs, rotary>,
    .store_kv = untyped<StoreKvArgs, store_kv>,
    .paged_attention = untyped<PagedAttentionArgs, paged_attention>,
    .experts = untyped<ExpertsArgs, experts>,
    .probe = untyped<ProbeArgs, probe>,
    .round_groups = untyped<RoundArgs, round_groups>,
    .argmax = untyped<ArgmaxArgs, argmax>,
    .draw = untyped<DrawArgs, draw>,
};

}  // namespace puna::PUNA_LEVEL
