// Token shards seen as one sequence of tokens.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "shard_file.h"

namespace mypt::data {

// A contiguous run of tokens of 2 or 4 bytes, little-endian, aligned to their width: a whole shard
// or a part of one.
struct Span {
  const std::byte* tokens;
  std::uint64_t n_tokens;
  int width;
};

// Where the tokens of one file lie, as they were validated.
struct ShardSpec {
  std::string path;
  int width;
  std::uint64_t n_tokens;
  std::uint64_t offset;     // bytes before the first token
  std::uint64_t file_size;  // bytes
  Identity identity;
};

class Corpus {
 public:
  explicit Corpus(Io io = Io::kMap);
  Corpus(const Corpus&) = delete;
  Corpus& operator=(const Corpus&) = delete;

  void add_file(const ShardSpec& spec);

  // Refer to tokens that the caller keeps alive and unchanged.
  void add_memory(const std::byte* tokens, int width, std::uint64_t n_tokens);

  std::uint64_t n_tokens() const noexcept { return ends_.empty() ? 0 : ends_.back(); }

  // Bytes of the widest token.
  int width() const noexcept { return width_; }

  // Whether tokens are copied by system calls, not read where they lie.
  bool is_read() const noexcept { return io_ == Io::kRead; }

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

  // Throw in a process that was forked from the one that opened this: locks that were held there
  // stay locked here.
  void check_process() const;

  // The tokens of one shard from `token` on, at most `count` of them. Where they must be read they
  // go to `scratch`, which grows as needed.
  Span span(std::size_t shard, std::uint64_t token, std::uint64_t count, Scratch& scratch) const {
    Shard& s = shards_[shard];
    const std::uint64_t skipped = token - (ends_[shard] - s.n_tokens);
    const std::uint64_t n = std::min(count, s.n_tokens - skipped);
    const auto width = static_cast<std::uint64_t>(s.width);
    if (s.memory) return {s.memory + skipped * width, n, s.width};
    const std::uint64_t at = s.offset + skipped * width;
    if (io_ != Io::kRead) return {s.file->data() + at, n, s.width};
    return {read(s, shard, at, n, scratch), n, s.width};
  }

  // Ask for [start, start + count) ahead of time: the cache, or the disk under Io::kRead. A page
  // that is not resident is left alone by a prefetch into the cache.
  void prefetch(std::uint64_t start, std::uint64_t count) const;

  // Under Io::kMap: note that windows were read, one of them at `token`. Now and then that file is
  // checked, and pages are given back, so that what the process holds does not grow to the size of
  // the data.
  void touched(std::uint64_t windows, std::uint64_t token) const;

 private:
  struct Shard {
    std::unique_ptr<ShardFile> file;
    const std::byte* memory;  // or null
    std::uint64_t n_tokens;
    std::uint64_t offset;
    int width;
  };

  void add(Shard shard);
  const std::byte* read(Shard& shard, std::size_t index, std::uint64_t at, std::uint64_t count,
                        Scratch& scratch) const;
  void note_open(std::size_t index) const;

  const Io io_;
  const std::int64_t process_;
  int width_ = 2;
  std::uint64_t file_bytes_ = 0;
  mutable std::deque<Shard> shards_;  // files open themselves when they are first read
  std::vector<std::uint64_t> ends_;   // prefix sums: shard i ends before token ends_[i]
  mutable std::atomic<std::uint64_t> windows_touched_{0}, calls_{0};
  mutable std::mutex open_mutex_;
  mutable std::deque<std::size_t> open_;  // under Io::kRead, the oldest first
  mutable std::vector<bool> is_open_;
};

}  // namespace mypt::data
