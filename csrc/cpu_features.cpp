// Detection by cpuid and xgetbv. Bit numbers: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2A
// (CPUID, leaves 1 and 7) and volume 1, section 13.3 (XCR0).
#include "cpu_features.h"

#include <atomic>

#include "kernels/args.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

#include <cstdint>
#endif

namespace puna {

#if defined(__x86_64__) || defined(__i386__)

namespace {

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero where the processor has no such leaf.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

constexpr bool bit(std::uint64_t word, int index) { return (word >> index) & 1; }

// Which register states the operating system saves. Faults unless OSXSAVE is set. Written as assembly because the
// intrinsic would need -mxsave for this file.
std::uint64_t read_xcr0() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

constexpr std::uint64_t kAvxState = 0x6;       // XMM and YMM
constexpr std::uint64_t kAvx512State = 0xe6;   // and mask registers, ZMM upper halves, ZMM16-31
constexpr std::uint64_t kTileState = 0x60000;  // tile configuration and tile data

}  // namespace

std::vector<std::string> cpu_features() {
  const Registers leaf1 = cpuid(1, 0);
  if (!bit(leaf1.ecx, 27)) return {};  // OSXSAVE: without it the system saves no YMM state either
  const Registers leaf7 = cpuid(7, 0);
  // eax of leaf 7 is the highest subleaf; asking beyond it answers with another leaf's values on some processors.
  const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};

  const std::uint64_t xcr0 = read_xcr0();
  const bool avx = (xcr0 & kAvxState) == kAvxState && bit(leaf1.ecx, 28);
  const bool avx512 = avx && (xcr0 & kAvx512State) == kAvx512State && bit(leaf7.ebx, 16);
  const bool amx = (xcr0 & kTileState) == kTileState && bit(leaf7.edx, 24);

  std::vector<std::string> names;
  const auto add = [&names](const char* name, bool present) {
    if (present) names.emplace_back(name);
  };
  add("avx2", avx && bit(leaf7.ebx, 5));
  add("fma", avx && bit(leaf1.ecx, 12));
  add("f16c", avx && bit(leaf1.ecx, 29));
  add("avx_vnni", avx && bit(leaf7_1.eax, 4));
  add("avx512f", avx512);
  add("avx512bw", avx512 && bit(leaf7.ebx, 30));
  add("avx512dq", avx512 && bit(leaf7.ebx, 17));
  add("avx512vl", avx512 && bit(leaf7.ebx, 31));
  add("avx512_vnni", avx512 && bit(leaf7.ecx, 11));
  add("avx512_bf16", avx512 && bit(leaf7_1.eax, 5));
  add("amx_int8", amx && bit(leaf7.edx, 25));
  add("amx_bf16", amx && bit(leaf7.edx, 22));
  return names;
}

#else

std::vector<std::string> cpu_features() { return {}; }

#endif

namespace {

bool has_fast_bf16_dots() {
#if defined(__x86_64__) || defined(__i386__)
  constexpr std::uint32_t kGenu = 0x756e6547;  // ebx of "GenuineIntel"
  return bit(cpuid(7, 0).eax >= 1 ? cpuid(7, 1).eax : 0, 5) && cpuid(0, 0).ebx != kGenu;
#else
  return false;
#endif
}

std::atomic<bool>& bf16_dots_setting() {
  static std::atomic<bool> setting{has_fast_bf16_dots()};
  return setting;
}

}  // namespace

bool bf16_dots() { return bf16_dots_setting().load(std::memory_order_relaxed); }

void set_bf16_dots(bool uses) { bf16_dots_setting() = uses; }

}  // namespace puna
