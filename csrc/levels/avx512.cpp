// The kernels of the level avx512; CMakeLists.txt has its compiler flags.
#define PUNA_LEVEL avx512
#define PUNA_AVX512

#include "../kernels/all.h"
