// How much scratch memory the kernels need, for all levels alike.
#include <cstddef>

#include "args.h"

namespace puna {

std::size_t linear_scratch(const LinearArgs&) { return 0; }
std::size_t paged_attention_scratch(const PagedAttentionArgs&) { return 0; }
std::size_t experts_scratch(const ExpertsArgs&) { return 0; }

}  // namespace puna
