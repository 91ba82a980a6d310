#include "widen.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mypt::data {
namespace {

template <class Token>
std::uint32_t one_scalar(const Token* src, std::size_t n, std::int64_t* dst) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    dst[i] = src[i];
    largest = std::max<std::uint32_t>(largest, src[i]);
  }
  return largest;
}

template <class Token>
std::uint32_t pair_scalar(const Token* src, std::size_t n, std::int64_t* x, std::int64_t* y) {
  return std::max(one_scalar(src, n, x), one_scalar(src + 1, n, y));
}

// Plain loops: compilers know how to make a copy with a maximum of vectors.
template <class Token, class Out>
std::uint32_t narrow_scalar(const Token* src, std::size_t n, Out* dst) {
  Token largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    dst[i] = src[i];
    largest = std::max(largest, src[i]);
  }
  return largest;
}

constexpr Kernels kScalarKernels = {
    {one_scalar<std::uint16_t>, pair_scalar<std::uint16_t>,
     narrow_scalar<std::uint16_t, std::uint16_t>, narrow_scalar<std::uint16_t, std::uint32_t>},
    {one_scalar<std::uint32_t>, pair_scalar<std::uint32_t>, nullptr,
     narrow_scalar<std::uint32_t, std::uint32_t>},
};

#if defined(__x86_64__)
// Each block widens 8 tokens. The maximum is taken on the narrow tokens, of the targets only: with
// the first input they are all n + 1 of a window.
#define MYPT_AVX2 __attribute__((target("avx2")))
#define MYPT_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw")))

MYPT_AVX2 inline __m128i load8(const std::uint16_t* src) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
}
MYPT_AVX2 inline __m256i load8(const std::uint32_t* src) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
}
MYPT_AVX2 inline __m128i larger(__m128i a, __m128i b) { return _mm_max_epu16(a, b); }
MYPT_AVX2 inline __m256i larger(__m256i a, __m256i b) { return _mm256_max_epu32(a, b); }

MYPT_AVX2 inline std::uint32_t reduce(__m128i v) {
  alignas(16) std::uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), v);
  return *std::max_element(lanes, lanes + 8);
}
MYPT_AVX2 inline std::uint32_t reduce(__m256i v) {
  alignas(32) std::uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  return *std::max_element(lanes, lanes + 8);
}

MYPT_AVX2 inline void store8_avx2(std::int64_t* dst, __m128i v) {
  auto* out = reinterpret_cast<__m256i*>(dst);
  _mm256_storeu_si256(out, _mm256_cvtepu16_epi64(v));
  _mm256_storeu_si256(out + 1, _mm256_cvtepu16_epi64(_mm_srli_si128(v, 8)));
}
MYPT_AVX2 inline void store8_avx2(std::int64_t* dst, __m256i v) {
  auto* out = reinterpret_cast<__m256i*>(dst);
  _mm256_storeu_si256(out, _mm256_cvtepu32_epi64(_mm256_castsi256_si128(v)));
  _mm256_storeu_si256(out + 1, _mm256_cvtepu32_epi64(_mm256_extracti128_si256(v, 1)));
}
// Masked, because GCC 12 warns about the undefined lanes inside its own unmasked intrinsics.
constexpr __mmask8 kAll = 0xFF;
MYPT_AVX512 inline void store8_avx512(std::int64_t* dst, __m128i v) {
  _mm512_storeu_si512(dst, _mm512_maskz_cvtepu16_epi64(kAll, v));
}
MYPT_AVX512 inline void store8_avx512(std::int64_t* dst, __m256i v) {
  _mm512_storeu_si512(dst, _mm512_maskz_cvtepu32_epi64(kAll, v));
}

// A macro, not a template over the instruction set: a target attribute cannot depend on a template
// parameter, and without it the intrinsics are not inlined.
#define MYPT_WIDEN(NAME, TARGET, STORE8)                                                        \
  template <class Token>                                                                        \
  TARGET std::uint32_t one_##NAME(const Token* src, std::size_t n, std::int64_t* dst) {         \
    const std::size_t even = n - n % 8;                                                         \
    if (even == 0) return one_scalar(src, n, dst);                                              \
    auto largest = load8(src);                                                                  \
    for (std::size_t i = 0; i < even; i += 8) {                                                 \
      const auto tokens = load8(src + i);                                                       \
      STORE8(dst + i, tokens);                                                                  \
      largest = larger(largest, tokens);                                                        \
    }                                                                                           \
    return std::max(reduce(largest), one_scalar(src + even, n - even, dst + even));             \
  }                                                                                             \
  template <class Token>                                                                        \
  TARGET std::uint32_t pair_##NAME(const Token* src, std::size_t n, std::int64_t* x,            \
                                   std::int64_t* y) {                                           \
    const std::size_t even = n - n % 8;                                                         \
    if (even == 0) return pair_scalar(src, n, x, y);                                            \
    auto largest = load8(src);                                                                  \
    for (std::size_t i = 0; i < even; i += 8) {                                                 \
      STORE8(x + i, load8(src + i));                                                            \
      const auto targets = load8(src + i + 1);                                                  \
      STORE8(y + i, targets);                                                                   \
      largest = larger(largest, targets);                                                       \
    }                                                                                           \
    if (even == n) return reduce(largest);                                                      \
    return std::max(reduce(largest), pair_scalar(src + even, n - even, x + even, y + even));    \
  }                                                                                             \
  template <class Token, class Out>                                                             \
  TARGET std::uint32_t narrow_##NAME(const Token* src, std::size_t n, Out* dst) {               \
    Token largest = 0;                                                                          \
    for (std::size_t i = 0; i < n; ++i) {                                                       \
      dst[i] = src[i];                                                                          \
      largest = largest < src[i] ? src[i] : largest;                                            \
    }                                                                                           \
    return largest;                                                                             \
  }                                                                                             \
  constexpr Kernels k_##NAME##_kernels = {                                                      \
      {one_##NAME<std::uint16_t>, pair_##NAME<std::uint16_t>,                                   \
       narrow_##NAME<std::uint16_t, std::uint16_t>,                                             \
       narrow_##NAME<std::uint16_t, std::uint32_t>},                                            \
      {one_##NAME<std::uint32_t>, pair_##NAME<std::uint32_t>, nullptr,                          \
       narrow_##NAME<std::uint32_t, std::uint32_t>},                                            \
  };

MYPT_WIDEN(avx2, MYPT_AVX2, store8_avx2)
MYPT_WIDEN(avx512, MYPT_AVX512, store8_avx512)
#endif

bool is_available(Kernel kernel) noexcept {
  if (kernel == Kernel::kScalar) return true;
#if defined(__x86_64__)
  if (kernel == Kernel::kAvx2) return __builtin_cpu_supports("avx2");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw");
#else
  return false;
#endif
}

}  // namespace

const Kernels& kernels_for(Kernel kernel) noexcept {
#if defined(__x86_64__)
  if (kernel == Kernel::kAvx512) return k_avx512_kernels;
  if (kernel == Kernel::kAvx2) return k_avx2_kernels;
#else
  (void)kernel;
#endif
  return kScalarKernels;
}

std::vector<Kernel> available_kernels() {
  std::vector<Kernel> kernels;
  for (const Kernel kernel : {Kernel::kScalar, Kernel::kAvx2, Kernel::kAvx512}) {
    if (is_available(kernel)) kernels.push_back(kernel);
  }
  return kernels;
}

Kernel best_kernel() noexcept {
  if (is_available(Kernel::kAvx512)) return Kernel::kAvx512;
  return is_available(Kernel::kAvx2) ? Kernel::kAvx2 : Kernel::kScalar;
}

const char* kernel_name(Kernel kernel) noexcept {
  switch (kernel) {
    case Kernel::kAvx512: return "avx512";
    case Kernel::kAvx2: return "avx2";
    default: return "scalar";
  }
}

Kernel kernel_from_name(const std::string& name) {
  if (name == "auto") return best_kernel();
  std::string known = "auto";
  for (const Kernel kernel : available_kernels()) {
    if (name == kernel_name(kernel)) return kernel;
    known += std::string(", ") + kernel_name(kernel);
  }
  throw std::invalid_argument("kernel '" + name + "' is not available here; there are: " + known);
}

}  // namespace mypt::data
