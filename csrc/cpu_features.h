// What instruction sets this processor and its operating system offer: the one place that asks.
#pragma once

#include <string>
#include <vector>

namespace puna {

// Names as Linux spells them in /proc/cpuinfo, out of: avx2 fma f16c avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni
// avx512_bf16 amx_int8 amx_bf16. Empty on processors that are not x86.
//
// A name is listed only where the operating system also saves the registers it needs. For AMX a Linux process must
// still ask for permission (arch_prctl, ARCH_REQ_XCOMP_PERM) before its first tile instruction.
std::vector<std::string> cpu_features();

// Sets what bf16_dots() of kernels/args.h answers. At first: whether the processor has vdpbf16ps and is not one of
// Intel's. There it starts every other cycle (measured on Sapphire Rapids: 0.09 TFLOPS a core, and 0.178 for float32 fma,
// of which two begin in each cycle), while on Zen 5 it has twice the rate of fma.
void set_bf16_dots(bool uses);

}  // namespace puna
