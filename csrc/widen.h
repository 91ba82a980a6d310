// The innermost loops: copy unsigned tokens, in one version per instruction set.
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
  // As `one`, to narrower tokens. narrow16 of 4-byte tokens would cut them off: there is none.
  std::uint32_t (*narrow16)(const Token* src, std::size_t n, std::uint16_t* dst);
  std::uint32_t (*narrow32)(const Token* src, std::size_t n, std::uint32_t* dst);
};

struct Kernels {
  Widen<std::uint16_t> u16;
  Widen<std::uint32_t> u32;
};

const Kernels& kernels_for(Kernel kernel) noexcept;

}  // namespace mypt::data
