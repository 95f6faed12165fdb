// vec_tests LEVEL INPUT OUTPUT: runs every wrapper of vec.h at one level. tests/kernels/test_vec.py compares what comes out
// with numpy and with the other levels.
//
// INPUT: float32 numbers, a third of them x, then y, then z. OUTPUT: for each wrapper its name in 32 bytes, the length of
// its results in bytes as int64, and the results.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "vec_level.h"

namespace puna {
#if defined(__x86_64__)
namespace avx512 { void check_vec(const VecInputs& in); }
namespace avx2vnni { void check_vec(const VecInputs& in); }
namespace avx2 { void check_vec(const VecInputs& in); }
#endif
namespace portable { void check_vec(const VecInputs& in); }
}  // namespace puna

namespace {

std::FILE* output = nullptr;

void emit(const char* name, const void* data, std::size_t bytes) {
  char padded[32] = {};
  std::strncpy(padded, name, sizeof padded - 1);
  const auto length = static_cast<std::int64_t>(bytes);
  std::fwrite(padded, 1, sizeof padded, output);
  std::fwrite(&length, sizeof length, 1, output);
  std::fwrite(data, 1, bytes, output);
}

void (*level_of(const std::string& name))(const puna::VecInputs&) {
#if defined(__x86_64__)
  if (name == "avx512") return puna::avx512::check_vec;
  if (name == "avx2vnni") return puna::avx2vnni::check_vec;
  if (name == "avx2") return puna::avx2::check_vec;
#endif
  return name == "portable" ? puna::portable::check_vec : nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  const auto check = argc == 4 ? level_of(argv[1]) : nullptr;
  std::FILE* input = check ? std::fopen(argv[2], "rb") : nullptr;
  if (input == nullptr) {
    std::fprintf(stderr, "usage: vec_tests LEVEL INPUT OUTPUT\n");
    return 2;
  }
  std::vector<float> values;
  float value;
  while (std::fread(&value, sizeof value, 1, input) == 1) values.push_back(value);
  std::fclose(input);
  const std::size_t count = values.size() / 3;
  if (count % 64 != 0 || (output = std::fopen(argv[3], "wb")) == nullptr) return 2;
  std::vector<float> room(65536 + 16 * count);
  const float* x = values.data();
  check({x, x + count, x + 2 * count, static_cast<std::int64_t>(count), room.data(), emit});
  return std::fclose(output) == 0 ? 0 : 1;
}
