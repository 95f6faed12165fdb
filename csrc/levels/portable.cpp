// The kernels of the level portable; CMakeLists.txt has its compiler flags.
#define PUNA_LEVEL portable

#include "../kernels/all.h"
