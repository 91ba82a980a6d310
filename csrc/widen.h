// The innermost loops: unsigned tokens to int64, in one version per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gather.h"

namespace mypt::data {

template <class Token>
struct Widen {
  // dst[i] = src[i] for i < n; returns the largest.
  std::uint32_t (*one)(const Token* src, std::size_t n, std::int64_t* dst);
  // x[i] = src[i], y[i] = src[i + 1] for i < n; returns the largest of the n + 1.
  std::uint32_t (*pair)(const Token* src, std::size_t n, std::int64_t* x, std::int64_t* y);
};

struct Kernels {
  Widen<std::uint16_t> u16;
  Widen<std::uint32_t> u32;
};

const Kernels& kernels_for(Kernel kernel) noexcept;

}  // namespace mypt::data
