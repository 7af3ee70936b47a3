// The loops behind reduce(): compiled once per instruction set (see CMakeLists.txt), each into a namespace
// of its own. Includes nothing with inline functions, because the linker would keep only one copy of those,
// perhaps one that this machine cannot run.
#include "core/base/dtype.h"
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace paceline::PACELINE_ISA {
namespace {

using Size = std::size_t;
constexpr Size block_numel = 512;  // at most 8 KiB: blocks stay in the first-level cache

struct Half {
  std::uint16_t bits;
};
struct BFloat {
  std::uint16_t bits;
};
struct Bool {
  std::uint8_t value;
};
template <class R>
struct Complex {
  R re, im;
};

inline float as_float(std::uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline std::uint32_t as_bits(float f) {
  std::uint32_t b;
  __builtin_memcpy(&b, &f, 4);
  return b;
}

inline float to_float(BFloat x) { return as_float(std::uint32_t{x.bits} << 16); }
inline BFloat to_bfloat(float f) {
  const std::uint32_t b = as_bits(f);
  const std::uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return {static_cast<std::uint16_t>(f != f ? (b >> 16) | 0x40u : rounded)};
}

inline float to_float(Half x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  // Multiplying by 2^112 moves the exponent's bias and makes subnormals normal.
  const float scaled = as_float(magnitude << 13) * as_float(0x77800000u);
  const std::uint32_t b = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude & 0x3ffu) << 13 : as_bits(scaled);
  return as_float(sign | b);
}
inline Half to_half(float f) {
  const std::uint32_t b = as_bits(f), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  std::uint32_t h;
  if (a > 0x7f800000u) h = 0x7e00u;
  else if (a >= 0x477ff000u) h = 0x7c00u;                                   // rounds to infinity
  else if (a < 0x38800000u) h = as_bits(as_float(a) + 0.5f) - 0x3f000000u;  // subnormal: the adder rounds
  else h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  return {static_cast<std::uint16_t>(sign | h)};
}

// What a type accumulates in, and the arithmetic that wraps instead of overflowing.
template <class T>
struct Accumulate {
  using type = T;
};
template <>
struct Accumulate<Half> {
  using type = float;
};
template <>
struct Accumulate<BFloat> {
  using type = float;
};
template <class T>
struct Wrap {
  using type = std::uint32_t;
};
template <>
struct Wrap<std::int64_t> {
  using type = std::uint64_t;
};
template <>
struct Wrap<std::uint64_t> {
  using type = std::uint64_t;
};
template <>
struct Wrap<float> {
  using type = float;
};
template <>
struct Wrap<double> {
  using type = double;
};

template <class T>
inline T add(T a, T b) {
  using W = typename Wrap<T>::type;
  return static_cast<T>(W(a) + W(b));
}
template <class T>
inline T multiply(T a, T b) {
  using W = typename Wrap<T>::type;
  return static_cast<T>(W(a) * W(b));
}
template <class R>
inline Complex<R> add(Complex<R> a, Complex<R> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class R>
inline Complex<R> multiply(Complex<R> a, Complex<R> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// Of narrow integers the number of ranks may not fit T: the division happens in what both fit.
template <class T>
inline T divide(T a, int n) {
  using W = decltype(T{} + T{});
  return static_cast<T>(W(a) / static_cast<W>(n));
}
template <class R>
inline Complex<R> divide(Complex<R> a, int n) {
  return {a.re / R(n), a.im / R(n)};
}

struct Sum {
  template <class T>
  static T of(T a, T b) {
    return add(a, b);
  }
  static Bool of(Bool a, Bool b) { return {static_cast<std::uint8_t>((a.value | b.value) != 0)}; }
};
struct Product {
  template <class T>
  static T of(T a, T b) {
    return multiply(a, b);
  }
  static Bool of(Bool a, Bool b) { return {static_cast<std::uint8_t>((a.value != 0) & (b.value != 0))}; }
};
// A NaN on either side wins, as in torch and NumPy.
struct Min {
  template <class T>
  static T of(T a, T b) {
    return (b < a) | (b != b) ? b : a;
  }
  static Bool of(Bool a, Bool b) { return Product::of(a, b); }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return (b > a) | (b != b) ? b : a;
  }
  static Bool of(Bool a, Bool b) { return Sum::of(a, b); }
};
struct BitAnd {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a & b);
  }
  static Bool of(Bool a, Bool b) { return Product::of(a, b); }
};
struct BitOr {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a | b);
  }
  static Bool of(Bool a, Bool b) { return Sum::of(a, b); }
};
struct BitXor {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a ^ b);
  }
  static Bool of(Bool a, Bool b) { return {static_cast<std::uint8_t>((a.value != 0) != (b.value != 0))}; }
};

template <class T>
void load(typename Accumulate<T>::type* out, const T* in, Size n) {
  for (Size i = 0; i < n; ++i) out[i] = to_float(in[i]);
}
template <class T>
void store(T* out, const float* in, Size n);
template <>
void store(BFloat* out, const float* in, Size n) {
  for (Size i = 0; i < n; ++i) out[i] = to_bfloat(in[i]);
}
template <>
void store(Half* out, const float* in, Size n) {
  Size i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
  for (; i < n; ++i) out[i] = to_half(in[i]);
}
#ifdef __F16C__
template <>
void load(float* out, const Half* in, Size n) {
  Size i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
#endif

template <class F, class A>
inline void combine(A* out, const A* a, const A* b, Size n) {
#pragma GCC ivdep
  for (Size i = 0; i < n; ++i) out[i] = F::of(a[i], b[i]);
}

// Two sources, two destinations that may be the sources: one pass, without the block in between.
template <class F, class A>
inline void combine_twice(A* first, A* second, const A* a, const A* b, Size n) {
#pragma GCC ivdep
  for (Size i = 0; i < n; ++i) first[i] = second[i] = F::of(a[i], b[i]);
}

template <class T, class F, bool is_mean>
void run(void* const* dst, int num_dst, const void* const* src, int num_src, Size numel, int divisor) {
  using A = typename Accumulate<T>::type;
  constexpr bool is_half = sizeof(A) != sizeof(T);
  if constexpr (!is_half && !is_mean)
    if (num_src == 2 && num_dst <= 2 && num_dst > 0) {
      const T *a = static_cast<const T*>(src[0]), *b = static_cast<const T*>(src[1]);
      T *first = static_cast<T*>(dst[0]), *second = static_cast<T*>(dst[num_dst - 1]);
      return num_dst == 1 ? combine<F>(first, a, b, numel) : combine_twice<F>(first, second, a, b, numel);
    }
  alignas(64) A acc[block_numel];
  alignas(64) A loaded[is_half ? block_numel : 1];
  for (Size at = 0; at < numel; at += block_numel) {
    const Size n = numel - at < block_numel ? numel - at : block_numel;
    auto source = [&](int s) { return static_cast<const T*>(src[s]) + at; };
    auto destination = [&](int d) { return static_cast<T*>(dst[d]) + at; };
    if constexpr (is_half) {
      load(acc, source(0), n);
      for (int s = 1; s < num_src; ++s) {
        load(loaded, source(s), n);
        combine<F>(acc, acc, loaded, n);
      }
    } else if (num_src == 1) {
      for (Size i = 0; i < n; ++i) acc[i] = source(0)[i];
    } else {
      combine<F>(acc, source(0), source(1), n);
      for (int s = 2; s < num_src; ++s) combine<F>(acc, acc, source(s), n);
    }
    if constexpr (is_mean)
      for (Size i = 0; i < n; ++i) acc[i] = divide(acc[i], divisor);
    for (int d = 0; d < num_dst; ++d) {
      if constexpr (is_half) {
        if (d == 0) store(destination(0), acc, n);
        else __builtin_memcpy(destination(d), destination(0), n * sizeof(T));
      } else {
        __builtin_memcpy(destination(d), acc, n * sizeof(T));
      }
    }
  }
}

using Kernel = void (*)(void* const*, int, const void* const*, int, Size, int);

template <class T>
constexpr Kernel numeric(ReduceOp op) {
  switch (op) {
    case ReduceOp::sum: return run<T, Sum, false>;
    case ReduceOp::product: return run<T, Product, false>;
    case ReduceOp::mean: return run<T, Sum, true>;
    default: return nullptr;
  }
}
template <class T>
constexpr Kernel ordered(ReduceOp op) {
  if (op == ReduceOp::min) return run<T, Min, false>;
  if (op == ReduceOp::max) return run<T, Max, false>;
  return numeric<T>(op);
}
template <class T>
constexpr Kernel bitwise(ReduceOp op) {
  if (op == ReduceOp::band) return run<T, BitAnd, false>;
  if (op == ReduceOp::bor) return run<T, BitOr, false>;
  if (op == ReduceOp::bxor) return run<T, BitXor, false>;
  return nullptr;
}
template <class T>
constexpr Kernel integer(ReduceOp op) {
  return bitwise<T>(op) ? bitwise<T>(op) : ordered<T>(op);
}

constexpr Kernel boolean(ReduceOp op) {
  switch (op) {
    case ReduceOp::sum: return run<Bool, Sum, false>;
    case ReduceOp::product: return run<Bool, Product, false>;
    case ReduceOp::min: return run<Bool, Min, false>;
    case ReduceOp::max: return run<Bool, Max, false>;
    case ReduceOp::mean: return nullptr;
    default: return bitwise<Bool>(op);
  }
}

}  // namespace

// Past the caches: what is larger than them would only push out what is still needed.
void scale(float* to, const float* from, Size n, float factor) {
  Size i = 0;
#ifdef __AVX512F__
  for (; i < n && (reinterpret_cast<Size>(to + i) & 63) != 0; ++i) to[i] = from[i] * factor;
  for (const __m512 f = _mm512_set1_ps(factor); i + 16 <= n; i += 16)
    _mm512_stream_ps(to + i, _mm512_mul_ps(_mm512_loadu_ps(from + i), f));
  _mm_sfence();
#elif defined(__AVX2__)
  for (; i < n && (reinterpret_cast<Size>(to + i) & 31) != 0; ++i) to[i] = from[i] * factor;
  for (const __m256 f = _mm256_set1_ps(factor); i + 8 <= n; i += 8)
    _mm256_stream_ps(to + i, _mm256_mul_ps(_mm256_loadu_ps(from + i), f));
  _mm_sfence();
#endif
  for (; i < n; ++i) to[i] = from[i] * factor;
}

// The loop for a pair, or nullptr where the pair has no meaning.
Kernel kernel(DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::float32: return ordered<float>(op);
    case DType::float64: return ordered<double>(op);
    case DType::float16: return ordered<Half>(op);
    case DType::bfloat16: return ordered<BFloat>(op);
    case DType::int8: return integer<std::int8_t>(op);
    case DType::uint8: return integer<std::uint8_t>(op);
    case DType::int16: return integer<std::int16_t>(op);
    case DType::uint16: return integer<std::uint16_t>(op);
    case DType::int32: return integer<std::int32_t>(op);
    case DType::uint32: return integer<std::uint32_t>(op);
    case DType::int64: return integer<std::int64_t>(op);
    case DType::uint64: return integer<std::uint64_t>(op);
    case DType::boolean: return boolean(op);
    case DType::complex64: return numeric<Complex<float>>(op);
    case DType::complex128: return numeric<Complex<double>>(op);
  }
  return nullptr;
}

}  // namespace paceline::PACELINE_ISA
