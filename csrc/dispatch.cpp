#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu_features.h"

namespace puna {

// CMakeLists.txt says which levels there are.
#if defined(PUNA_WITH_avx512)
namespace avx512 { extern const Kernels kKernels; }
#endif
#if defined(PUNA_WITH_avx2vnni)
namespace avx2vnni { extern const Kernels kKernels; }
#endif
#if defined(PUNA_WITH_avx2)
namespace avx2 { extern const Kernels kKernels; }
#endif
namespace portable { extern const Kernels kKernels; }

namespace {

struct Level {
  const Kernels* kernels;
  std::vector<const char*> needs;
};

const std::vector<Level>& levels() {
  static const std::vector<Level> all = {
#if defined(PUNA_WITH_avx512)
      {&avx512::kKernels,
       {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"}},
#endif
#if defined(PUNA_WITH_avx2vnni)
      {&avx2vnni::kKernels, {"avx2", "fma", "f16c", "avx_vnni"}},
#endif
#if defined(PUNA_WITH_avx2)
      {&avx2::kKernels, {"avx2", "fma", "f16c"}},
#endif
      {&portable::kKernels, {}},
  };
  return all;
}

const std::vector<const Kernels*>& supported() {
  static const std::vector<const Kernels*> found = [] {
    const std::vector<std::string> features = cpu_features();
    std::vector<const Kernels*> fitting;
    for (const Level& level : levels()) {
      const bool fits = std::all_of(level.needs.begin(), level.needs.end(), [&](const char* name) {
        return std::find(features.begin(), features.end(), name) != features.end();
      });
      if (fits) fitting.push_back(level.kernels);
    }
    return fitting;
  }();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (const Kernels* level : supported()) names.emplace_back(level->level);
  return names;
}

const Kernels& kernels() {
  if (const Kernels* level = chosen.load(std::memory_order_relaxed)) return *level;
  const char* wanted = std::getenv("PUNA_CPU_LEVEL");  // the one place that reads it
  set_level(wanted && *wanted ? wanted : supported().front()->level);
  return *chosen.load();
}

void set_level(const std::string& name) {
  std::string names;
  for (const Kernels* level : supported()) {
    if (level->level == name) {
      chosen = level;
      return;
    }
    names += names.empty() ? level->level : std::string(", ") + level->level;
  }
  throw std::invalid_argument("the level of the CPU kernels (PUNA_CPU_LEVEL) is " + name + ": use one that this " +
                              "processor runs: " + names);
}

std::string kernel_name(Kernel kernel) {
  for (const Kernels* level : supported()) {
    const std::pair<Kernel, const char*> named[] = {
        {level->linear, "linear"},
        {level->embedding, "embedding"},
        {level->rms_norm, "rms_norm"},
        {level->add, "add"},
        {level->gated_activation, "gated_activation"},
        {level->rotary, "rotary"},
        {level->store_kv, "store_kv"},
        {level->paged_attention, "paged_attention"},
        {level->experts, "experts"},
        {level->probe, "probe"},
        {level->round_groups, "round_groups"},
        {level->argmax, "argmax"},
        {level->draw, "draw"},
    };
    for (const auto& [one, name] : named)
      if (one == kernel) return name;
  }
  return "?";
}

}  // namespace puna
