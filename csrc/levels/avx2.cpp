// The kernels of the level avx2; CMakeLists.txt has its compiler flags.
#define PUNA_LEVEL avx2
#define PUNA_AVX2

#include "../kernels/all.h"
