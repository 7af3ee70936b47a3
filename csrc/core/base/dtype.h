// Element types and reduction operators; the codes are shared with the bindings and with peers.
#pragma once
#include <cstddef>
#include <cstdint>

namespace paceline {

enum class DType : std::uint8_t {
  float32,
  float64,
  float16,
  bfloat16,
  int8,
  uint8,
  int16,
  uint16,
  int32,
  uint32,
  int64,
  uint64,
  boolean,
  complex64,
  complex128,
};
inline constexpr int num_dtypes = 15;

enum class ReduceOp : std::uint8_t { sum, product, min, max, mean, band, bor, bxor };
inline constexpr int num_reduce_ops = 8;

constexpr std::size_t size_of(DType dtype) {
  constexpr std::size_t sizes[num_dtypes] = {4, 8, 2, 2, 1, 1, 2, 2, 4, 4, 8, 8, 1, 8, 16};
  return sizes[static_cast<int>(dtype)];
}

const char* name_of(DType dtype);
const char* name_of(ReduceOp op);

}  // namespace paceline
