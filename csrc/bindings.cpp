// What Python sees of the compiled kernels: the module puna._kernels and nothing else. Its types for checkers are in
// src/puna/_kernels.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.h"

NB_MODULE(_kernels, m) {
  m.def("cpu_features", &puna::cpu_features,
        "Instruction sets that this processor and its operating system support, as /proc/cpuinfo spells them.");
}
