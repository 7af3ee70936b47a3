// One source, several instruction sets: a kernel body is written once and compiled for AVX-512, AVX2 and
// the baseline; the best one that this CPU has is chosen when it is called.
#pragma once
#include <cstdint>
#include <cstring>

#define PACELINE_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define PACELINE_X86 1
#define PACELINE_AVX2 __attribute__((target("avx2,f16c,bmi,bmi2,popcnt")))
#define PACELINE_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,bmi,bmi2,popcnt,prefer-vector-width=512")))
#else
#define PACELINE_X86 0
#define PACELINE_AVX2
#define PACELINE_AVX512
#endif

namespace paceline::codec {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that this CPU has and `limit_isa` allows.
Isa isa();
// For tests: never choose better than `limit`, so that every variant can be compared with the reference.
void limit_isa(Isa limit);

template <auto Body, class... A>
PACELINE_AVX512 void run_avx512(A... arguments) {
  Body(arguments...);
}
template <auto Body, class... A>
PACELINE_AVX2 void run_avx2(A... arguments) {
  Body(arguments...);
}

// Calls Body, an always_inline function of plain loops, as compiled for the chosen instruction set.
template <auto Body, class... A>
void run_best(A... arguments) {
#if PACELINE_X86
  if (isa() == Isa::avx512) return run_avx512<Body>(arguments...);
  if (isa() == Isa::avx2) return run_avx2<Body>(arguments...);
#endif
  Body(arguments...);
}

// Two forms of one kernel, chosen by a run-time flag.
template <auto IfTrue, auto IfFalse, class... A>
void run(bool flag, A... arguments) {
  if (flag) {
    run_best<IfTrue>(arguments...);
  } else {
    run_best<IfFalse>(arguments...);
  }
}

PACELINE_INLINE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

PACELINE_INLINE float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What stays behind of `value` once `sent` is sent. Infinities and NaN travel, so that loss scalers see
// them, but they never enter a residual: there the old residual is kept.
PACELINE_INLINE float remainder_of(float value, float sent, float old_residual) {
  const float remainder = value - sent;
  return (bits_of(remainder) & 0x7f800000u) == 0x7f800000u ? old_residual : remainder;
}

}  // namespace paceline::codec
