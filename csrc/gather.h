// Copy windows of tokens to where a batch goes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "corpus.h"

namespace mypt::data {

enum class Kernel { kScalar, kAvx2, kAvx512 };

Kernel best_kernel() noexcept;
std::vector<Kernel> available_kernels();
const char* kernel_name(Kernel kernel) noexcept;
Kernel kernel_from_name(const std::string& name);  // "auto" is the best; throws when unavailable

// Where `rows` windows go. Either x and y, row-major, seq_len int64 each, which do not overlap: the
// inputs and the targets. Or `windows`, seq_len + 1 tokens a row, of `width` bytes.
struct Batch {
  std::int64_t* x;
  std::int64_t* y;
  std::byte* windows;
  int width;
  std::size_t rows;
  std::size_t seq_len;
};

// Fill x with tokens [s, s + T) and y with [s + 1, s + T + 1) for each start s, or a row of windows
// with [s, s + T + 1), and return the largest id seen. `starts` holds batch.rows + upcoming
// values: the last ones are where the next call will read, and are only prefetched; from a corpus
// that is read by system calls, `advised` says that an earlier call did so for this batch. Throws
// std::out_of_range before writing anything.
std::uint32_t gather(const Corpus& corpus, const std::uint64_t* starts, std::size_t upcoming,
                     bool advised, const Batch& batch, Kernel kernel,
                     Scratch& scratch);

}  // namespace mypt::data
