#include "corpus.h"

#include <unistd.h>

#include <limits>
#include <stdexcept>
#include <utility>

#include "errors.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "token shards are little-endian; this machine needs the NumPy loader"
#endif

namespace mypt::data {
namespace {

// Positions are handed to Python and to int64 arrays, so they stay below 2^63.
constexpr std::uint64_t kMaxTokens = std::numeric_limits<std::int64_t>::max();
constexpr std::uint64_t kCacheLine = 64;
// Of the 1024 files that a process may usually have open: there may be a corpus for every phase.
constexpr std::size_t kMaxOpen = 64;
// A fault maps up to 16 pages around it.
constexpr std::uint64_t kBytesAFault = 64 << 10;
constexpr std::uint64_t kCallsACheck = 16;  // a check takes a microsecond, a batch a few
constexpr std::uint64_t kMaxMapped = std::uint64_t{512} << 20;

void check_width(int width) {
  if (width != 2 && width != 4) {
    throw std::invalid_argument("a token is 2 or 4 bytes wide, not " + std::to_string(width));
  }
}

}  // namespace

Corpus::Corpus(Io io) : io_(io), process_(::getpid()) {}

void Corpus::check_process() const {
  if (process_ == ::getpid()) return;
  throw DataError("a batch in a forked process", "the data was opened before the fork",
                  "open it after the fork");
}

void Corpus::add_file(const ShardSpec& spec) {
  check_width(spec.width);
  const auto unit = static_cast<std::uint64_t>(spec.width);
  if (spec.offset % unit != 0) {
    throw std::invalid_argument("the header offset must be a multiple of the width");
  }
  if (spec.offset > spec.file_size || spec.n_tokens > (spec.file_size - spec.offset) / unit) {
    throw IntegrityError("shard " + spec.path,
                         std::to_string(spec.file_size) + " bytes, too few for " +
                             std::to_string(spec.n_tokens) + " tokens of " +
                             std::to_string(spec.width) + " bytes after a header of " +
                             std::to_string(spec.offset),
                         "prepare the dataset again");
  }
  auto file = std::make_unique<ShardFile>(spec.path, spec.file_size, spec.identity, io_);
  if (io_ == Io::kMemory) file->data();
  file_bytes_ += spec.file_size;
  add({std::move(file), nullptr, spec.n_tokens, spec.offset, spec.width});
}

void Corpus::add_memory(const std::byte* tokens, int width, std::uint64_t n_tokens) {
  check_width(width);
  if (reinterpret_cast<std::uintptr_t>(tokens) % static_cast<std::uintptr_t>(width) != 0) {
    throw std::invalid_argument("the tokens are not aligned to their width");
  }
  add({nullptr, tokens, n_tokens, 0, width});
}

void Corpus::add(Shard shard) {
  const std::uint64_t before = n_tokens();
  if (shard.n_tokens > kMaxTokens - before) {
    throw std::overflow_error("a corpus holds fewer than 2^63 tokens");
  }
  ends_.push_back(before + shard.n_tokens);
  is_open_.push_back(false);
  width_ = std::max(width_, shard.width);
  shards_.push_back(std::move(shard));
}

const std::byte* Corpus::read(Shard& shard, std::size_t index, std::uint64_t at,
                              std::uint64_t count, Scratch& scratch) const {
  const auto bytes = static_cast<std::size_t>(count * static_cast<std::uint64_t>(shard.width));
  shard.file->read(at, bytes, scratch);
  note_open(index);
  return scratch.bytes.data();
}

void Corpus::note_open(std::size_t index) const {
  if (shards_.size() <= kMaxOpen) return;
  const std::lock_guard<std::mutex> lock(open_mutex_);
  if (is_open_[index]) return;
  is_open_[index] = true;
  open_.push_back(index);
  if (open_.size() > kMaxOpen) {
    const std::size_t oldest = open_.front();
    open_.pop_front();
    is_open_[oldest] = false;
    shards_[oldest].file->rest();
  }
}

void Corpus::prefetch(std::uint64_t start, std::uint64_t count) const {
  const std::size_t index = shard_of(start);
  Shard& shard = shards_[index];
  const std::uint64_t skipped = start - (ends_[index] - shard.n_tokens);
  const auto width = static_cast<std::uint64_t>(shard.width);
  const std::uint64_t bytes = std::min(count, shard.n_tokens - skipped) * width;
  const std::uint64_t at = shard.offset + skipped * width;
  if (!shard.memory && io_ == Io::kRead) {
    shard.file->will_need(at, static_cast<std::size_t>(bytes));
    note_open(index);
    return;
  }
  const std::byte* tokens = shard.memory ? shard.memory + at : shard.file->data() + at;
  for (std::uint64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(tokens + i);
}

void Corpus::touched(std::uint64_t windows, std::uint64_t token) const {
  if (io_ != Io::kMap) return;
  const std::uint64_t call = calls_.fetch_add(1, std::memory_order_relaxed);
  if (call % kCallsACheck == 0) {
    Shard& shard = shards_[shard_of(token)];
    if (shard.file) shard.file->check();
  }
  if (file_bytes_ <= kMaxMapped) return;
  const std::uint64_t all = windows_touched_.fetch_add(windows, std::memory_order_relaxed) + windows;
  if (all * kBytesAFault < kMaxMapped) return;
  windows_touched_.store(0, std::memory_order_relaxed);
  for (Shard& shard : shards_) {
    if (shard.file) shard.file->forget_pages();
  }
}

}  // namespace mypt::data
