// One corpus in one order: sample numbers in, batches out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "corpus.h"
#include "gather.h"
#include "order.h"

namespace mypt::data {

class BatchSource {
 public:
  BatchSource(std::shared_ptr<const Corpus> corpus, std::shared_ptr<const SampleStream> order,
              Kernel kernel)
      : corpus_(std::move(corpus)), order_(std::move(order)), kernel_(kernel) {
    if (corpus_->n_tokens() != order_->n_tokens()) {
      throw std::invalid_argument("the order is for " + std::to_string(order_->n_tokens()) +
                                  " tokens, the corpus has " + std::to_string(corpus_->n_tokens()));
    }
  }

  std::uint64_t seq_len() const noexcept { return order_->seq_len(); }
  int width() const noexcept { return corpus_->width(); }
  bool is_read() const noexcept { return corpus_->is_read(); }

  // Fill a batch with the samples from `first` on; the next call will read from `next` on. Returns
  // the largest token id. What a thread needs on the way is kept in `work`, its own.
  struct Work {
    std::vector<std::uint64_t> starts;
    Scratch scratch;
  };
  std::uint32_t read(std::uint64_t first, const Batch& batch, std::uint64_t next, bool advised,
                     Work& work) const {
    // Prefetching 4 rows ahead hides the latency: 8, 16 and 32 measured the same, and without any
    // a batch takes 1.2 times (B8 T1024) to 2.7 times (B64 T256) longer. A disk wants all of them.
    const std::size_t upcoming =
        is_read() ? (advised ? 0 : batch.rows) : std::min(batch.rows, kMaxUpcoming);
    work.starts.resize(batch.rows + upcoming);
    order_->starts(first, batch.rows, work.starts.data());
    order_->starts(next, upcoming, work.starts.data() + batch.rows);
    return gather(*corpus_, work.starts.data(), upcoming, advised, batch, kernel_, work.scratch);
  }

  // Ask the disk for the windows of samples [first, first + count).
  void advise(std::uint64_t first, std::size_t count, Work& work) const {
    work.starts.resize(count);
    order_->starts(first, count, work.starts.data());
    for (const std::uint64_t start : work.starts) corpus_->prefetch(start, seq_len() + 1);
  }

 private:
  static constexpr std::size_t kMaxUpcoming = 4;

  std::shared_ptr<const Corpus> corpus_;
  std::shared_ptr<const SampleStream> order_;
  Kernel kernel_;
};

}  // namespace mypt::data
