// The kernels of the level avx2vnni; CMakeLists.txt has its compiler flags.
#define PUNA_LEVEL avx2vnni
#define PUNA_AVX2
#define PUNA_AVXVNNI

#include "../kernels/all.h"
