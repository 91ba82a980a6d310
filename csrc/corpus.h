// Token shards seen as one sequence of tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "mapped_file.h"

namespace mypt::data {

// A contiguous run of tokens of 2 or 4 bytes, little-endian, aligned to their width: a whole shard
// or a part of one.
struct Span {
  const std::byte* tokens;
  std::uint64_t n_tokens;
  int width;
};

class Corpus {
 public:
  Corpus() = default;
  Corpus(Corpus&&) = default;
  Corpus(const Corpus&) = delete;
  Corpus& operator=(const Corpus&) = delete;

  // Map a file; n_tokens is what the caller validated, and the file must still have that size.
  void add_file(const std::string& path, int width, std::uint64_t n_tokens, std::uint64_t offset);

  // Refer to tokens that the caller keeps alive and unchanged.
  void add_memory(const std::byte* tokens, int width, std::uint64_t n_tokens);

  std::uint64_t n_tokens() const noexcept { return ends_.empty() ? 0 : ends_.back(); }

  // Whether [start, start + count) lies in the corpus; never overflows.
  bool contains(std::uint64_t start, std::uint64_t count) const noexcept {
    return count <= n_tokens() && start <= n_tokens() - count;
  }

  // The shard that holds `token`; empty shards hold none. token must be < n_tokens().
  std::size_t shard_of(std::uint64_t token) const noexcept {
    if (ends_.size() == 1) return 0;
    return static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end(), token) -
                                    ends_.begin());
  }

  // The tokens of one shard from `token` on, at most `count` of them.
  Span span(std::size_t shard, std::uint64_t token, std::uint64_t count) const noexcept {
    const Span& s = shards_[shard];
    const std::uint64_t skipped = token - (ends_[shard] - s.n_tokens);
    return {s.tokens + skipped * static_cast<std::uint64_t>(s.width),
            std::min(count, s.n_tokens - skipped), s.width};
  }

 private:
  void add(const Span& shard);

  std::vector<MappedFile> files_;
  std::vector<Span> shards_;
  std::vector<std::uint64_t> ends_;  // prefix sums: shard i ends before token ends_[i]
};

}  // namespace mypt::data
