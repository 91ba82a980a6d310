#include "gather.h"

#include <algorithm>
#include <stdexcept>

#include "widen.h"

namespace mypt::data {
namespace {

// Rows of so many tokens fetch the row that comes later stretch by stretch, between stretches of
// their own: at once, a row's lines are more than a core can wait for. Shorter rows lose by it.
constexpr std::size_t kLongRow = 512;
constexpr std::size_t kStretch = 64;

// A window that is to be in the cache when its turn comes.
struct Ahead {
  const Corpus& corpus;
  std::uint64_t start = 0, length = 0;  // 0: none

  void fetch(std::size_t at, std::size_t count) const {
    if (length) corpus.prefetch(start + at, count);
  }
};

template <class Token>
std::uint32_t copy_whole(const Token* tokens, std::size_t n, std::int64_t* x, std::int64_t* y,
                         const Widen<Token>& widen, const Ahead& ahead) {
  std::uint32_t largest = 0;
  for (std::size_t at = 0; at < n; at += kStretch) {
    const std::size_t part = std::min(kStretch, n - at);
    ahead.fetch(at, part);
    largest = std::max(largest, widen.pair(tokens + at, part, x + at, y + at));
  }
  return largest;
}

template <class Token>
std::uint32_t copy_pair(const Token* tokens, std::size_t n, std::size_t done, const Batch& batch,
                        std::size_t row, const Widen<Token>& widen, const Ahead& ahead) {
  std::int64_t* x = batch.x + row * batch.seq_len;
  std::int64_t* y = batch.y + row * batch.seq_len;
  const bool is_whole = n == batch.seq_len + 1;
  if (is_whole && n > kLongRow) return copy_whole(tokens, batch.seq_len, x, y, widen, ahead);
  if (done == 0) ahead.fetch(0, batch.seq_len + 1);
  if (is_whole) return widen.pair(tokens, batch.seq_len, x, y);
  // A piece of a window that crosses shards: tokens [done, done + n) of its T + 1.
  std::uint32_t largest = widen.one(tokens, std::min(n, batch.seq_len - done), x + done);
  const std::size_t skip = done == 0;  // the first token of a window is no target
  return std::max(largest, widen.one(tokens + skip, n - skip, y + done + skip - 1));
}

template <class Token>
std::uint32_t copy_span(const Token* tokens, std::size_t n, std::size_t done, const Batch& batch,
                        std::size_t row, const Widen<Token>& widen, const Ahead& ahead) {
  if (!batch.windows) return copy_pair(tokens, n, done, batch, row, widen, ahead);
  if (done == 0) ahead.fetch(0, batch.seq_len + 1);
  const std::size_t at = row * (batch.seq_len + 1) + done;
  if (batch.width == 4) {
    return widen.narrow32(tokens, n, reinterpret_cast<std::uint32_t*>(batch.windows) + at);
  }
  if constexpr (sizeof(Token) == 2) {
    return widen.narrow16(tokens, n, reinterpret_cast<std::uint16_t*>(batch.windows) + at);
  }
  throw std::invalid_argument("4-byte tokens do not fit windows of 2 bytes");
}

std::uint32_t copy_row(const Corpus& corpus, std::uint64_t start, const Batch& batch,
                       std::size_t row, const Kernels& kernels, const Ahead& ahead,
                       Scratch& scratch) {
  std::uint32_t largest = 0;
  std::size_t shard = corpus.shard_of(start);
  for (std::size_t done = 0, total = batch.seq_len + 1; done < total; ++shard) {
    const Span span = corpus.span(shard, start + done, total - done, scratch);
    const auto n = static_cast<std::size_t>(span.n_tokens);
    if (n == 0) continue;  // an empty shard between two others
    const std::uint32_t seen =
        span.width == 2
            ? copy_span(reinterpret_cast<const std::uint16_t*>(span.tokens), n, done, batch, row,
                        kernels.u16, ahead)
            : copy_span(reinterpret_cast<const std::uint32_t*>(span.tokens), n, done, batch, row,
                        kernels.u32, ahead);
    largest = std::max(largest, seen);
    done += n;
  }
  return largest;
}

}  // namespace

std::uint32_t gather(const Corpus& corpus, const std::uint64_t* starts, std::size_t upcoming,
                     bool advised, const Batch& batch, Kernel kernel,
                     Scratch& scratch) {
  corpus.check_process();
  const std::size_t known = batch.rows + upcoming;
  const std::uint64_t length = std::uint64_t{batch.seq_len} + 1;
  for (std::size_t i = 0; i < known; ++i) {
    if (!corpus.contains(starts[i], length)) {
      throw std::out_of_range("window at token " + std::to_string(starts[i]) + " of length " +
                              std::to_string(batch.seq_len) + " + 1 leaves the corpus of " +
                              std::to_string(corpus.n_tokens()));
    }
  }
  const Kernels& kernels = kernels_for(kernel);
  std::uint32_t largest = 0;
  if (corpus.is_read()) {
    // The disk works on all windows at once, and on the next batch's while this one is copied.
    for (std::size_t i = advised ? batch.rows : 0; i < known; ++i) {
      corpus.prefetch(starts[i], length);
    }
    upcoming = 0;
  }
  for (std::size_t row = 0; row < batch.rows; ++row) {
    // DRAM latency hides behind the copy of earlier rows.
    const bool is_known = upcoming && row + upcoming < known;
    const Ahead ahead{corpus, is_known ? starts[row + upcoming] : 0, is_known ? length : 0};
    largest = std::max(largest, copy_row(corpus, starts[row], batch, row, kernels, ahead, scratch));
  }
  if (batch.rows) corpus.touched(batch.rows, starts[0]);
  return largest;
}

}  // namespace mypt::data
