// Which instruction level's kernels this process uses.
#pragma once

#include <string>
#include <vector>

#include "kernels/args.h"

namespace puna {

// The levels that this processor can run, the best first; "portable" is always the last.
std::vector<std::string> supported_levels();

// The kernels in use: those of the level that the environment variable PUNA_CPU_LEVEL names, else the best level's, until
// another is chosen. Throws std::invalid_argument where the variable names one that the processor cannot run.
const Kernels& kernels();

// Chooses a level for every call from now on. Throws std::invalid_argument for one that the processor cannot run.
void set_level(const std::string& level);

// What a kernel of any level is called, or "?".
std::string kernel_name(Kernel kernel);

}  // namespace puna
