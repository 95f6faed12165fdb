// What Python sees of the compiled kernels: the module puna._kernels and nothing else. Its types for checkers are in
// src/puna/_kernels.pyi. Tensors come as addresses (an nb::ndarray argument costs 2 us, an integer nothing), so shapes and
// dtypes are checked by the caller, src/puna/ops/cpu.py; what an address and a size alone can tell is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "dispatch.h"
#include "pool.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace puna {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

// No tensor is near this; products of two such sizes still fit into 64 bits.
constexpr Size kMostElements = Size{1} << 31;

void check_size(const char* name, Size value, Size least = 0) {
  if (value < least || value >= kMostElements)
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ": it must be from " +
                                std::to_string(least) + " up to 2^31");
}

Size element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2; }

void check_address(const char* name, Address address, Size alignment) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " is null");
  if (address % static_cast<Address>(alignment) != 0)
    throw std::invalid_argument(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
}

Dtype dtype_of(const char* name, int value, bool cache = false) {
  if (value < 0 || value > (cache ? 3 : 2))
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ": it must be the number of a dtype");
  return static_cast<Dtype>(value);
}

Activation activation_of(int value) {
  if (value < 0 || value > 4)
    throw std::invalid_argument("activation is " + std::to_string(value) + ": it must be from 0 to 4");
  return static_cast<Activation>(value);
}

PanelFormat format_of(int dense, int bits, int groups, int minimums) {
  if (bits != 0 && bits != 4 && bits != 8)
    throw std::invalid_argument("bits is " + std::to_string(bits) + ": it must be 0, 4 or 8");
  if (groups < 1 || groups > 2)
    throw std::invalid_argument("groups is " + std::to_string(groups) + ": it must be 1 or 2");
  return {dtype_of("dense", dense), bits, groups, minimums != 0};
}

template <class T>
const T* at(Address address) { return reinterpret_cast<const T*>(address); }
template <class T>
T* to(Address address) { return reinterpret_cast<T*>(address); }

void raise(Failure failure) {
  if (failure == Failure::token_out_of_range) throw std::out_of_range("a token id is outside of the vocabulary");
  if (failure == Failure::block_out_of_range) throw std::out_of_range("a cache block is outside of the pool");
}

// Runs the task, or appends it to this thread's recording. `work` is about how many numbers are touched, or multiplied.
void submit(Task task, Size work) {
  // What one thread does in about 5 us is not worth a barrier, which costs far more where the other is off its core.
  constexpr Size kSharedWork = Size{1} << 15;
  // From about 100 us on other Python threads get their turn; to get the lock back can take milliseconds.
  constexpr Size kLongWork = Size{1} << 21;
  task.serial = work < kSharedWork;
  if (Recording* recording = Recording::current()) return recording->append(task);
  if (work < kLongWork) return raise(Pool::instance().run(&task, 1));
  Failure failure;
  {
    nb::gil_scoped_release release;
    failure = Pool::instance().run(&task, 1);
  }
  raise(failure);
}

void linear(Address x, Address weight, Address bias, Address y, Size x_stride, Size y_stride, Size rows, Size inputs,
            Size outputs, int dense, int bits, int groups, int minimums, int x_dtype, int y_dtype, int activation,
            bool gated) {
  LinearArgs args{};
  args.format = format_of(dense, bits, groups, minimums);
  args.x_dtype = dtype_of("x_dtype", x_dtype);
  args.y_dtype = dtype_of("y_dtype", y_dtype);
  args.activation = activation_of(activation);
  args.gated = gated;
  check_size("rows", rows);
  check_size("inputs", inputs, 1);
  check_size("outputs", outputs, 1);
  check_size("x_stride", x_stride, inputs);
  check_size("y_stride", y_stride, outputs);
  if (gated && outputs % kPanel != 0)
    throw std::invalid_argument("outputs is " + std::to_string(outputs) + ": gated layers need a multiple of 32");
  if (rows == 0) return;
  check_address("x", x, element_size(args.x_dtype));
  check_address("weight", weight, 64);
  if (bias) check_address("bias", bias, element_size(args.x_dtype));
  check_address("y", y, element_size(args.y_dtype));
  args.x = at<void>(x);
  args.weight = at<void>(weight);
  args.bias = at<void>(bias);
  args.y = to<void>(y);
  args.x_stride = x_stride;
  args.y_stride = y_stride;
  args.rows = rows;
  args.inputs = inputs;
  args.outputs = outputs;
  submit(Task::of(kernels().linear, args, linear_scratch(args)),
         rows * inputs < kMostElements ? rows * inputs * outputs : kMostElements);
}

void embedding(Address ids, Address table, Address y, Size rows, Size vocabulary, Size inputs, Size table_stride,
               bool is_panels, int dense, int bits, int groups, int minimums, int y_dtype) {
  EmbeddingArgs args{};
  args.format = format_of(dense, bits, groups, minimums);
  args.dtype = args.format.dense;
  args.y_dtype = dtype_of("y_dtype", y_dtype);
  args.is_panels = is_panels;
  check_size("rows", rows);
  check_size("vocabulary", vocabulary, 1);
  check_size("inputs", inputs, 1);
  if (!is_panels) check_size("table_stride", table_stride, inputs);
  if (rows == 0) return;
  check_address("ids", ids, 8);
  check_address("table", table, is_panels ? 64 : element_size(args.dtype));
  check_address("y", y, element_size(args.y_dtype));
  args.ids = at<std::int64_t>(ids);
  args.table = at<void>(table);
  args.y = to<void>(y);
  args.rows = rows;
  args.vocabulary = vocabulary;
  args.inputs = inputs;
  args.table_stride = table_stride;
  submit(Task::of(kernels().embedding, args), rows * inputs);
}

void rms_norm(Address x, Address residual, Address weight, Address sum, Address y, Size outer, Size inner, Size size,
              Size x_outer_stride, Size x_inner_stride, float epsilon, int dtype) {
  RmsNormArgs args{};
  args.dtype = dtype_of("dtype", dtype);
  check_size("outer", outer);
  check_size("inner", inner, 1);
  check_size("size", size, 1);
  check_size("x_outer_stride", x_outer_stride, size);
  check_size("x_inner_stride", x_inner_stride);
  if ((residual == 0) != (sum == 0)) throw std::invalid_argument("residual and sum come together or not at all");
  if (residual && inner != 1) throw std::invalid_argument("a residual is for whole rows: inner must be 1");
  if (outer == 0) return;
  const Size alignment = element_size(args.dtype);
  check_address("x", x, alignment);
  if (residual) check_address("residual", residual, alignment);
  check_address("weight", weight, alignment);
  if (sum) check_address("sum", sum, alignment);
  check_address("y", y, alignment);
  args.x = at<void>(x);
  args.residual = at<void>(residual);
  args.weight = at<void>(weight);
  args.sum = to<void>(sum);
  args.y = to<void>(y);
  args.outer = outer;
  args.inner = inner;
  args.size = size;
  args.x_outer_stride = x_outer_stride;
  args.x_inner_stride = x_inner_stride;
  args.epsilon = epsilon;
  submit(Task::of(kernels().rms_norm, args), outer * inner * size);
}

void add(Address a, Address b, Address y, Size count, int dtype) {
  AddArgs args{};
  args.dtype = dtype_of("dtype", dtype);
  check_size("count", count);
  if (count == 0) return;
  check_address("a", a, element_size(args.dtype));
  check_address("b", b, element_size(args.dtype));
  check_address("y", y, element_size(args.dtype));
  args.a = at<void>(a);
  args.b = at<void>(b);
  args.y = to<void>(y);
  args.count = count;
  submit(Task::of(kernels().add, args), count);
}

void gated_activation(Address gate_up, Address y, Size rows, Size size, int activation, int dtype) {
  GatedActivationArgs args{};
  args.dtype = dtype_of("dtype", dtype);
  args.activation = activation_of(activation);
  check_size("rows", rows);
  check_size("size", size, 1);
  if (rows == 0) return;
  check_address("gate_up", gate_up, element_size(args.dtype));
  check_address("y", y, element_size(args.dtype));
  args.gate_up = at<void>(gate_up);
  args.y = to<void>(y);
  args.rows = rows;
  args.size = size;
  submit(Task::of(kernels().gated_activation, args), 2 * rows * size);
}

void rotary(Address x, Address cos, Address sin, Address y, Size tokens, Size heads, Size head_size, Size x_stride,
            Size angle_stride, int dtype) {
  RotaryArgs args{};
  args.dtype = dtype_of("dtype", dtype);
  check_size("tokens", tokens);
  check_size("heads", heads, 1);
  check_size("head_size", head_size, 2);
  if (head_size % 2 != 0) throw std::invalid_argument("head_size is odd: pairs are rotated");
  check_size("x_stride", x_stride, heads * head_size);
  check_size("angle_stride", angle_stride, head_size / 2);
  if (tokens == 0) return;
  check_address("x", x, element_size(args.dtype));
  check_address("cos", cos, 4);
  check_address("sin", sin, 4);
  check_address("y", y, element_size(args.dtype));
  args.x = at<void>(x);
  args.cos = at<float>(cos);
  args.sin = at<float>(sin);
  args.y = to<void>(y);
  args.tokens = tokens;
  args.heads = heads;
  args.head_size = head_size;
  args.x_stride = x_stride;
  args.angle_stride = angle_stride;
  submit(Task::of(kernels().rotary, args), tokens * heads * head_size);
}

CacheArgs cache_of(Address keys, Address values, Size blocks, Size kv_heads, Size block_size, Size head_size,
                   int dtype) {
  CacheArgs cache{};
  cache.dtype = dtype_of("cache_dtype", dtype, true);
  check_size("blocks", blocks, 1);
  check_size("kv_heads", kv_heads, 1);
  check_size("block_size", block_size, 16);
  check_size("head_size", head_size, 2);
  if (block_size % 16 != 0) throw std::invalid_argument("block_size must be a multiple of 16");
  if (head_size % 2 != 0 || head_size > 256)
    throw std::invalid_argument("head_size is " + std::to_string(head_size) + ": it must be even and at most 256");
  check_address("keys", keys, 4);
  check_address("values", values, 4);
  cache.keys = to<void>(keys);
  cache.values = to<void>(values);
  cache.blocks = blocks;
  cache.kv_heads = kv_heads;
  cache.block_size = block_size;
  cache.head_size = head_size;
  return cache;
}

void store_kv(Address key, Address value, Address slots, Size tokens, Size key_stride, Size value_stride, int dtype,
              Address keys, Address values, Size blocks, Size kv_heads, Size block_size, Size head_size,
              int cache_dtype) {
  StoreKvArgs args{};
  args.cache = cache_of(keys, values, blocks, kv_heads, block_size, head_size, cache_dtype);
  args.dtype = dtype_of("dtype", dtype);
  check_size("tokens", tokens);
  check_size("key_stride", key_stride, kv_heads * head_size);
  check_size("value_stride", value_stride, kv_heads * head_size);
  if (tokens == 0) return;
  check_address("key", key, element_size(args.dtype));
  check_address("value", value, element_size(args.dtype));
  check_address("slots", slots, 8);
  args.key = at<void>(key);
  args.value = at<void>(value);
  args.slots = at<std::int64_t>(slots);
  args.tokens = tokens;
  args.key_stride = key_stride;
  args.value_stride = value_stride;
  submit(Task::of(kernels().store_kv, args), 2 * tokens * kv_heads * head_size);
}

void paged_attention(Address query, Address y, Address block_tables, Address query_starts, Address sequence_lengths,
                     Size sequences, Size heads, Size query_stride, Size table_stride, Size table_width, Size window,
                     float scale, int dtype, Address keys, Address values, Size blocks, Size kv_heads, Size block_size,
                     Size head_size, int cache_dtype) {
  PagedAttentionArgs args{};
  args.cache = cache_of(keys, values, blocks, kv_heads, block_size, head_size, cache_dtype);
  args.dtype = dtype_of("dtype", dtype);
  check_size("sequences", sequences);
  check_size("heads", heads, 1);
  if (heads % kv_heads != 0) throw std::invalid_argument("heads must be a multiple of kv_heads");
  check_size("query_stride", query_stride, heads * head_size);
  check_size("table_width", table_width, 1);
  check_size("table_stride", table_stride, table_width);
  check_size("window", window);
  if (sequences == 0) return;
  check_address("query", query, element_size(args.dtype));
  check_address("y", y, element_size(args.dtype));
  check_address("block_tables", block_tables, 4);
  check_address("query_starts", query_starts, 4);
  check_address("sequence_lengths", sequence_lengths, 4);
  args.query = at<void>(query);
  args.y = to<void>(y);
  args.block_tables = at<std::int32_t>(block_tables);
  args.query_starts = at<std::int32_t>(query_starts);
  args.sequence_lengths = at<std::int32_t>(sequence_lengths);
  args.sequences = sequences;
  args.heads = heads;
  args.query_stride = query_stride;
  args.table_stride = table_stride;
  args.table_width = table_width;
  args.window = window;
  args.scale = scale;
  submit(Task::of(kernels().paged_attention, args, paged_attention_scratch(args)), kMostElements);
}

void experts(Address x, Address router_logits, Address gate_up, Address proj, Address y, Size tokens, Size hidden,
             Size inner, Size count, Size top, int dense, int bits, int groups, int minimums, int proj_dense,
             int proj_bits, int proj_groups, int proj_minimums, int activation, int dtype) {
  ExpertsArgs args{};
  args.gate_up_format = format_of(dense, bits, groups, minimums);
  args.proj_format = format_of(proj_dense, proj_bits, proj_groups, proj_minimums);
  args.activation = activation_of(activation);
  args.dtype = dtype_of("dtype", dtype);
  check_size("tokens", tokens);
  check_size("hidden", hidden, 1);
  check_size("inner", inner, 1);
  check_size("count", count, 1);
  check_size("top", top, 1);
  if (top > count) throw std::invalid_argument("top is more than there are experts");
  if (inner % kPanel != 0) throw std::invalid_argument("inner must be a multiple of 32");
  if (tokens == 0) return;
  check_address("x", x, element_size(args.dtype));
  check_address("router_logits", router_logits, element_size(args.dtype));
  check_address("gate_up", gate_up, 8);
  check_address("proj", proj, 8);
  check_address("y", y, element_size(args.dtype));
  args.x = at<void>(x);
  args.router_logits = at<void>(router_logits);
  args.gate_up = at<const void*>(gate_up);
  args.proj = at<const void*>(proj);
  for (Size i = 0; i < count; ++i) {
    check_address("gate_up", reinterpret_cast<Address>(args.gate_up[i]), 64);
    check_address("proj", reinterpret_cast<Address>(args.proj[i]), 64);
  }
  args.y = to<void>(y);
  args.tokens = tokens;
  args.hidden = hidden;
  args.inner = inner;
  args.experts = count;
  args.top = top;
  submit(Task::of(kernels().experts, args, experts_scratch(args)), kMostElements);
}

void probe(int kind, Address memory, Size bytes, Size iterations, Address operations) {
  if (kind < 0 || kind > 3) throw std::invalid_argument("kind is " + std::to_string(kind) + ": it must be from 0 to 3");
  ProbeArgs args{};
  args.kind = kind;
  if (bytes < 0 || iterations < 0) throw std::invalid_argument("bytes and iterations must not be negative");
  if (kind == 0) check_address("memory", memory, 64);
  check_address("operations", operations, 8);
  args.memory = at<void>(memory);
  args.bytes = bytes;
  args.iterations = iterations;
  args.operations = to<double>(operations);
  submit(Task::of(kernels().probe, args), kMostElements);
}

void round_groups(Address rows, Address panels, Size first, Size count, Size inputs, Size stride, int bits, int dtype) {
  RoundArgs args{};
  if (bits != 4 && bits != 8)
    throw std::invalid_argument("bits is " + std::to_string(bits) + ": it must be 4 or 8");
  args.bits = bits;
  args.dtype = dtype_of("dtype", dtype);
  check_size("first", first);
  check_size("count", count);
  check_size("inputs", inputs, 1);
  check_size("stride", stride, inputs);
  if (count == 0) return;
  check_address("rows", rows, element_size(args.dtype));
  check_address("panels", panels, 64);
  args.rows = at<void>(rows);
  args.panels = to<void>(panels);
  args.first = first;
  args.count = count;
  args.inputs = inputs;
  args.stride = stride;
  submit(Task::of(kernels().round_groups, args), count * inputs < kMostElements ? count * inputs * 64 : kMostElements);
}

void argmax(Address x, Address indices, Address values, Size rows, Size size, Size x_stride) {
  ArgmaxArgs args{};
  check_size("rows", rows);
  check_size("size", size, 1);
  if (size > Size{1} << 24)
    throw std::invalid_argument("size is " + std::to_string(size) + ": it must be from 1 to 2^24");
  check_size("x_stride", x_stride, size);
  if (rows == 0) return;
  check_address("x", x, 4);
  check_address("indices", indices, 8);
  check_address("values", values, 4);
  args.x = at<float>(x);
  args.indices = to<std::int64_t>(indices);
  args.values = to<float>(values);
  args.rows = rows;
  args.size = size;
  args.x_stride = x_stride;
  submit(Task::of(kernels().argmax, args), rows == 1 ? 0 : rows * size);
}

void draw(Address x, Address temperature, Address top_k, Address top_p, Address min_p, Address uniform, Address tokens,
          Address highest, Size rows, Size size, Size x_stride) {
  DrawArgs args{};
  check_size("rows", rows);
  check_size("size", size, 1);
  if (size > Size{1} << 24)
    throw std::invalid_argument("size is " + std::to_string(size) + ": it must be from 1 to 2^24");
  check_size("x_stride", x_stride, size);
  if (rows == 0) return;
  check_address("x", x, 4);
  check_address("temperature", temperature, 4);
  if (top_k) check_address("top_k", top_k, 8);
  if (top_p) check_address("top_p", top_p, 8);
  if (min_p) check_address("min_p", min_p, 4);
  check_address("uniform", uniform, 8);
  check_address("tokens", tokens, 8);
  check_address("highest", highest, 4);
  args.x = at<float>(x);
  args.temperature = at<float>(temperature);
  args.top_k = at<std::int64_t>(top_k);
  args.top_p = at<double>(top_p);
  args.min_p = at<float>(min_p);
  args.uniform = at<double>(uniform);
  args.tokens = to<std::int64_t>(tokens);
  args.highest = to<float>(highest);
  args.rows = rows;
  args.size = size;
  args.x_stride = x_stride;
  submit(Task::of(kernels().draw, args), rows == 1 ? 0 : rows < kMostElements / size ? rows * size : kMostElements);
}

nb::list profile(const Recording& recording) {
  std::vector<Recording::Timed> timed;
  Failure failure;
  {
    nb::gil_scoped_release release;
    failure = recording.run_timed(timed);
  }
  raise(failure);
  nb::list found;
  for (const auto& [kernel, nanoseconds] : timed) found.append(nb::make_tuple(kernel, 1e-9 * static_cast<double>(nanoseconds)));
  return found;
}

void replay(const Recording& recording) {
  Failure failure;
  {
    nb::gil_scoped_release release;
    failure = recording.run();
  }
  raise(failure);
}

void set_threads(int count) {
  if (count < 1 || count > 1024)
    throw std::invalid_argument("the number of threads is " + std::to_string(count) + ": it must be from 1 to 1024");
  nb::gil_scoped_release release;
  Pool::instance().set_threads(count);
}

}  // namespace
}  // namespace puna

NB_MODULE(_kernels, m) {
  using namespace puna;
  // At the end of a process that has not closed its engine, recordings are still alive, and so what; a warning about it
  // is nothing that a user could act on.
  nb::set_leak_warnings(false);
  m.def("cpu_features", &cpu_features,
        "Instruction sets that this processor and its operating system support, as /proc/cpuinfo spells them.");
  m.def("supported_levels", &supported_levels, "The instruction levels of the kernels that run here, the best first.");
  m.def("level", [] { return std::string(kernels().level); }, "The level in use.");
  m.def("set_level", &set_level, "level"_a, "Chooses the level of all later calls. Raises ValueError for others.");
  m.def("threads", [] { return Pool::instance().threads(); }, "How many threads kernels run on.");
  m.def("set_threads", &set_threads, "count"_a, "Chooses how many threads all later calls run on.");

  m.def("bf16_dots", &bf16_dots, "Whether bfloat16 meets bfloat16 in vdpbf16ps, at level avx512.");
  m.def("set_bf16_dots", &set_bf16_dots, "uses"_a, "Chooses it for all later calls, against what the processor suggests.");

  m.def("linear", &linear, "x"_a, "weight"_a, "bias"_a, "y"_a, "x_stride"_a, "y_stride"_a, "rows"_a, "inputs"_a,
        "outputs"_a, "dense"_a, "bits"_a, "groups"_a, "minimums"_a, "x_dtype"_a, "y_dtype"_a, "activation"_a, "gated"_a);
  m.def("embedding", &embedding, "ids"_a, "table"_a, "y"_a, "rows"_a, "vocabulary"_a, "inputs"_a, "table_stride"_a,
        "is_panels"_a, "dense"_a, "bits"_a, "groups"_a, "minimums"_a, "y_dtype"_a);
  m.def("rms_norm", &rms_norm, "x"_a, "residual"_a, "weight"_a, "sum"_a, "y"_a, "outer"_a, "inner"_a, "size"_a,
        "x_outer_stride"_a, "x_inner_stride"_a, "epsilon"_a, "dtype"_a);
  m.def("add", &add, "a"_a, "b"_a, "y"_a, "count"_a, "dtype"_a);
  m.def("gated_activation", &gated_activation, "gate_up"_a, "y"_a, "rows"_a, "size"_a, "activation"_a, "dtype"_a);
  m.def("rotary", &rotary, "x"_a, "cos"_a, "sin"_a, "y"_a, "tokens"_a, "heads"_a, "head_size"_a, "x_stride"_a,
        "angle_stride"_a, "dtype"_a);
  m.def("store_kv", &store_kv, "key"_a, "value"_a, "slots"_a, "tokens"_a, "key_stride"_a, "value_stride"_a, "dtype"_a,
        "keys"_a, "values"_a, "blocks"_a, "kv_heads"_a, "block_size"_a, "head_size"_a, "cache_dtype"_a);
  m.def("paged_attention", &paged_attention, "query"_a, "y"_a, "block_tables"_a, "query_starts"_a,
        "sequence_lengths"_a, "sequences"_a, "heads"_a, "query_stride"_a, "table_stride"_a, "table_width"_a, "window"_a,
        "scale"_a, "dtype"_a, "keys"_a, "values"_a, "blocks"_a, "kv_heads"_a, "block_size"_a, "head_size"_a,
        "cache_dtype"_a);
  m.def("experts", &experts, "x"_a, "router_logits"_a, "gate_up"_a, "proj"_a, "y"_a, "tokens"_a, "hidden"_a, "inner"_a,
        "count"_a, "top"_a, "dense"_a, "bits"_a, "groups"_a, "minimums"_a, "proj_dense"_a, "proj_bits"_a,
        "proj_groups"_a, "proj_minimums"_a, "activation"_a, "dtype"_a);
  m.def("probe", &probe, "kind"_a, "memory"_a, "bytes"_a, "iterations"_a, "operations"_a);
  m.def("round_groups", &round_groups, "rows"_a, "panels"_a, "first"_a, "count"_a, "inputs"_a, "stride"_a, "bits"_a,
        "dtype"_a);
  m.def("argmax", &argmax, "x"_a, "indices"_a, "values"_a, "rows"_a, "size"_a, "x_stride"_a);
  m.def("draw", &draw, "x"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "uniform"_a, "tokens"_a, "highest"_a,
        "rows"_a, "size"_a, "x_stride"_a);

  nb::class_<Recording>(m, "Recording", "A list of kernel calls, made once and replayed without Python.")
      .def(nb::init<>())
      .def("begin", &Recording::begin, "This thread's kernel calls are appended from here on instead of run.")
      .def("end", &Recording::end)
      .def("replay", &replay, "Runs all calls in order.")
      .def("profile", &profile, "The same, and each call's kernel and seconds.")
      .def("__len__", &Recording::size);
}
