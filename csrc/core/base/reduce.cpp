#include "core/base/reduce.h"

namespace paceline {

using Kernel = void (*)(void* const*, int, const void* const*, int, std::size_t, int);
namespace generic {
Kernel kernel(DType, ReduceOp);
void scale(float*, const float*, std::size_t, float);
}  // namespace generic
#ifdef PACELINE_X86
namespace v3 {
Kernel kernel(DType, ReduceOp);
void scale(float*, const float*, std::size_t, float);
}  // namespace v3
namespace v4 {
Kernel kernel(DType, ReduceOp);
void scale(float*, const float*, std::size_t, float);
}  // namespace v4
#endif

namespace {

struct KernelTable {
  const char* isa = "generic";
  void (*scale)(float*, const float*, std::size_t, float) = generic::scale;
  Kernel kernels[num_dtypes][num_reduce_ops];

  KernelTable() {
    auto find = generic::kernel;
#ifdef PACELINE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512cd")) {
      find = v4::kernel;
      scale = v4::scale;
      isa = "x86-64-v4";
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")) {
      find = v3::kernel;
      scale = v3::scale;
      isa = "x86-64-v3";
    }
#endif
    for (int d = 0; d < num_dtypes; ++d)
      for (int o = 0; o < num_reduce_ops; ++o)
        kernels[d][o] = find(static_cast<DType>(d), static_cast<ReduceOp>(o));
  }
};

const KernelTable table;

}  // namespace

bool is_reducible(DType dtype, ReduceOp op) {
  return table.kernels[static_cast<int>(dtype)][static_cast<int>(op)] != nullptr;
}

void reduce(DType dtype, ReduceOp op, void* const* destinations, int num_destinations,
            const void* const* sources, int num_sources, std::size_t numel, int divisor) {
  table.kernels[static_cast<int>(dtype)][static_cast<int>(op)](destinations, num_destinations, sources,
                                                               num_sources, numel, divisor);
}

void scale(float* to, const float* from, std::size_t numel, float factor) {
  table.scale(to, from, numel, factor);
}

const char* reduce_isa() { return table.isa; }

const char* name_of(DType dtype) {
  static constexpr const char* names[num_dtypes] = {
      "float32", "float64", "float16", "bfloat16", "int8", "uint8",     "int16",     "uint16",
      "int32",   "uint32",  "int64",   "uint64",   "bool", "complex64", "complex128"};
  return names[static_cast<int>(dtype)];
}

const char* name_of(ReduceOp op) {
  static constexpr const char* names[num_reduce_ops] = {"sum",  "product", "min", "max",
                                                        "mean", "band",    "bor", "bxor"};
  return names[static_cast<int>(op)];
}

}  // namespace paceline
