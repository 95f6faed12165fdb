// The paged cache: storing keys and values, attention over them, and the order inside of a block.
#pragma once

#include "../vec.h"
#include "args.h"

namespace puna::PUNA_LEVEL {

inline void store_kv(const StoreKvArgs&, Worker&) {}
inline void paged_attention(const PagedAttentionArgs&, Worker&) {}

}  // namespace puna::PUNA_LEVEL
