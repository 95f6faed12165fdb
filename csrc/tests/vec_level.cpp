// Every wrapper of vec.h over the inputs, at one level: CMakeLists.txt compiles this once for each. As in kernels, nothing
// of the standard library here but plain functions.
#include "vec_level.h"

#include "../vec.h"

namespace puna::PUNA_LEVEL {

// Stores what `expression` makes of each vector x, y and z of the inputs, and emits all of it.
#define PUNA_CHECK_VECTORS(name, expression)                                             \
  for (std::int64_t i = 0; i < in.count; i += kLanes) {                                  \
    [[maybe_unused]] const F x = load(in.x + i), y = load(in.y + i), z = load(in.z + i); \
    store(room + i, expression);                                                         \
  }                                                                                      \
  in.emit(name, room, static_cast<std::size_t>(in.count) * 4)

#define PUNA_CHECK_INTEGERS(name, expression)                                                         \
  for (std::int64_t i = 0; i < in.count; i += kLanes) {                                               \
    [[maybe_unused]] const I x = load_int(integers(in.x) + i), y = load_int(integers(in.y) + i);      \
    store_int(reinterpret_cast<std::int32_t*>(room) + i, expression);                                 \
  }                                                                                                   \
  in.emit(name, room, static_cast<std::size_t>(in.count) * 4)

// 64 bytes of x, y and z at a time.
#define PUNA_CHECK_BYTES(name, Result, expression)                                                          \
  for (std::int64_t i = 0; i < in.count; i += kLanes) {                                                     \
    [[maybe_unused]] const Bytes x = load_bytes(in.x + i), y = load_bytes(in.y + i);                        \
    [[maybe_unused]] const void *x_at = in.x + i, *z_at = in.z + i;                                         \
    store_##Result(room + i, expression);                                                                   \
  }                                                                                                         \
  in.emit(name, room, static_cast<std::size_t>(in.count) * 4)

namespace {

const std::int32_t* integers(const float* p) { return reinterpret_cast<const std::int32_t*>(p); }
void store_I(float* p, I a) { store_int(reinterpret_cast<std::int32_t*>(p), a); }
void store_F(float* p, F a) { store(p, a); }
void store_Bytes(float* p, Bytes a) { store_bytes(p, a); }
// Small enough that a sum of products to it does not overflow.
I small(const void* p) {
  std::int32_t values[kLanes];
  std::memcpy(values, p, sizeof values);
  for (std::int32_t& value : values) value >>= 8;
  return load_int(values);
}

void check_arithmetic(const VecInputs& in, float* room) {
  PUNA_CHECK_VECTORS("add", x + y);
  PUNA_CHECK_VECTORS("subtract", x - y);
  PUNA_CHECK_VECTORS("multiply", x * y);
  PUNA_CHECK_VECTORS("divide", x / y);
  PUNA_CHECK_VECTORS("fma", fma(x, y, z));
  PUNA_CHECK_VECTORS("max", max(x, y));
  PUNA_CHECK_VECTORS("min", min(x, y));
  PUNA_CHECK_VECTORS("where_greater", where_greater(x, y, z, x));
  PUNA_CHECK_VECTORS("abs", abs(x));
  PUNA_CHECK_VECTORS("sqrt", sqrt(x));
  PUNA_CHECK_VECTORS("round", round(x));
  PUNA_CHECK_VECTORS("exp", exp(x));
  PUNA_CHECK_VECTORS("broadcast", broadcast(in.x[i]));
  PUNA_CHECK_VECTORS("zero", zero());
  for (std::int64_t i = 0; i < in.count / kLanes; ++i) room[i] = sum(load(in.x + i * kLanes));
  in.emit("sum", room, static_cast<std::size_t>(in.count / kLanes) * 4);
  for (std::int64_t i = 0; i < in.count / kLanes; ++i) room[i] = maximum(load(in.x + i * kLanes));
  in.emit("maximum", room, static_cast<std::size_t>(in.count / kLanes) * 4);
  float exponents[256] = {};
  for (int n = -126; n <= 127; ++n) exponents[n + 126] = static_cast<float>(n);
  for (int i = 0; i < 256; i += kLanes) store(room + i, power_of_two(load(exponents + i)));
  in.emit("power_of_two", room, 254 * 4);
}

void check_conversions(const VecInputs& in, float* room) {
  PUNA_CHECK_VECTORS("round_bf16", round_bf16(x));
  PUNA_CHECK_VECTORS("round_f16", round_f16(x));
  PUNA_CHECK_VECTORS("rounded_f32", rounded(x, Dtype::f32));
  PUNA_CHECK_VECTORS("rounded_bf16", rounded(x, Dtype::bf16));
  PUNA_CHECK_VECTORS("rounded_f16", rounded(x, Dtype::f16));
  auto* halves = reinterpret_cast<std::uint16_t*>(room);
  const std::size_t half_bytes = static_cast<std::size_t>(in.count) * 2;
  for (std::int64_t i = 0; i < in.count; i += kLanes) store_bf16(halves + i, load(in.x + i));
  in.emit("store_bf16", room, half_bytes);
  for (std::int64_t i = 0; i < in.count; i += kLanes) store_f16(halves + i, load(in.x + i));
  in.emit("store_f16", room, half_bytes);
  for (std::int64_t i = 0; i < in.count; ++i) halves[i] = float_to_bf16(in.x[i]);
  in.emit("float_to_bf16", room, half_bytes);
  for (std::int64_t i = 0; i < in.count; ++i) halves[i] = float_to_f16(in.x[i]);
  in.emit("float_to_f16", room, half_bytes);

  std::uint16_t patterns[kLanes];
  for (int vector = 0; vector < 65536; vector += kLanes) {
    for (int i = 0; i < kLanes; ++i) patterns[i] = static_cast<std::uint16_t>(vector + i);
    store(room + vector, load_bf16(patterns));
  }
  in.emit("load_bf16", room, 65536 * 4);
  for (int vector = 0; vector < 65536; vector += kLanes) {
    for (int i = 0; i < kLanes; ++i) patterns[i] = static_cast<std::uint16_t>(vector + i);
    store(room + vector, load_f16(patterns));
  }
  in.emit("load_f16", room, 65536 * 4);
  for (int i = 0; i < 65536; ++i) room[i] = bf16_to_float(static_cast<std::uint16_t>(i));
  in.emit("bf16_to_float", room, 65536 * 4);
  for (int i = 0; i < 65536; ++i) room[i] = f16_to_float(static_cast<std::uint16_t>(i));
  in.emit("f16_to_float", room, 65536 * 4);
}

void check_integers(const VecInputs& in, float* room) {
  PUNA_CHECK_VECTORS("to_float", to_float(load_int(integers(in.x) + i)));
  PUNA_CHECK_INTEGERS("to_int", to_int(load(in.x + i)));
  PUNA_CHECK_INTEGERS("bits_of", bits_of(load(in.x + i)));
  PUNA_CHECK_INTEGERS("add_int", small(in.x + i) + small(in.y + i));
  PUNA_CHECK_INTEGERS("max_int", max(x, y));
  PUNA_CHECK_INTEGERS("shift_left", shift_left<5>(x));
  PUNA_CHECK_INTEGERS("broadcast_int", broadcast_int(integers(in.x)[i]));
  auto* out = reinterpret_cast<std::int32_t*>(room);
  const std::int64_t vectors = in.count / kLanes;
  for (std::int64_t i = 0; i < vectors; ++i) out[i] = sum(small(in.x + i * kLanes));
  in.emit("sum_int", room, static_cast<std::size_t>(vectors) * 4);
  for (std::int64_t i = 0; i < vectors; ++i) out[i] = maximum(load_int(integers(in.x) + i * kLanes));
  in.emit("maximum_int", room, static_cast<std::size_t>(vectors) * 4);
  auto* bytes = reinterpret_cast<std::int8_t*>(room);
  for (std::int64_t i = 0; i < in.count; i += kLanes) {
    std::int32_t values[kLanes];
    for (int j = 0; j < kLanes; ++j) values[j] = static_cast<std::int8_t>(integers(in.x)[i + j]);
    store_int8(bytes + i, load_int(values));
  }
  in.emit("store_int8", room, static_cast<std::size_t>(in.count));
  PUNA_CHECK_VECTORS("load_int8", load_int8(reinterpret_cast<const std::int8_t*>(in.x) + i));
}

void check_bytes(const VecInputs& in, float* room) {
  PUNA_CHECK_BYTES("low_nibbles", Bytes, low_nibbles(x));
  PUNA_CHECK_BYTES("high_nibbles", Bytes, high_nibbles(x));
  PUNA_CHECK_BYTES("broadcast_quad", Bytes, broadcast_quad(x_at));
  PUNA_CHECK_BYTES("dot_bytes", I, dot(small(z_at), x, y));
  PUNA_CHECK_BYTES("first_of_pairs", F, first_of_pairs(load_pairs(x_at)));
  PUNA_CHECK_BYTES("second_of_pairs", F, second_of_pairs(load_pairs(x_at)));
  PUNA_CHECK_BYTES("broadcast_pair", F, first_of_pairs(broadcast_pair(x_at)));
  PUNA_CHECK_BYTES("dot_pairs", F, dot(load(in.z + i), load_pairs(in.x + i), load_pairs(in.y + i)));
}

// The first n lanes of each vector, n going round; what must stay untouched was zero before.
void check_tails(const VecInputs& in, float* room) {
  PUNA_CHECK_VECTORS("load_n", load_n(in.x + i, static_cast<int>(i / kLanes % (kLanes + 1))));
  PUNA_CHECK_VECTORS("first_n", first_n(x, y, static_cast<int>(i / kLanes % (kLanes + 1))));
  const std::size_t bytes = static_cast<std::size_t>(in.count) * 4;
  std::memset(room, 0, bytes);
  for (std::int64_t i = 0; i < in.count; i += kLanes)
    store_n(room + i, load(in.x + i), static_cast<int>(i / kLanes % (kLanes + 1)));
  in.emit("store_n", room, bytes);
  constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
  const char* loads[] = {"load_as_n_f32", "load_as_n_bf16", "load_as_n_f16"};
  const char* stores[] = {"store_as_n_f32", "store_as_n_bf16", "store_as_n_f16"};
  for (int dtype = 0; dtype < 3; ++dtype) {
    PUNA_CHECK_VECTORS(loads[dtype], load_as_n(in.x, i, kDtypes[dtype], static_cast<int>(1 + i / kLanes % kLanes)));
    std::memset(room, 0, bytes);
    for (std::int64_t i = 0; i < in.count; i += kLanes)
      store_as_n(room, i, load(in.x + i), kDtypes[dtype], static_cast<int>(1 + i / kLanes % kLanes));
    in.emit(stores[dtype], room, dtype == 0 ? bytes : bytes / 2);
  }
}

}  // namespace

void check_vec(const VecInputs& in);
void check_vec(const VecInputs& in) {
  check_arithmetic(in, in.room);
  check_conversions(in, in.room);
  check_integers(in, in.room);
  check_bytes(in, in.room);
  check_tails(in, in.room);
}

}  // namespace puna::PUNA_LEVEL
