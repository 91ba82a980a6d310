// Which window is sample i: the C++ twin of SampleOrder in mypt_fast/data/order.py, bit for bit.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "permutation.h"

namespace mypt::data {

inline constexpr const char* kReplacementAlgorithm = "draw/v1";
inline constexpr const char* kBlockAlgorithm = "feistel6-block/v1";
inline constexpr std::uint64_t kMaxSamples = INT64_MAX;

// Global sample numbers to the first tokens of their windows, in closed form. Immutable to its
// users, so that threads may share one.
class SampleStream {
 public:
  virtual ~SampleStream() = default;

  virtual std::uint64_t n_tokens() const noexcept = 0;
  virtual std::uint64_t seq_len() const noexcept = 0;

  // Write the starts of samples [first, first + count); throws when that leaves [0, 2^63).
  virtual void starts(std::uint64_t first, std::uint64_t count, std::uint64_t* out) const = 0;
};

// Throws std::invalid_argument when samples [first, first + count) leave [0, 2^63).
void check_samples(std::uint64_t first, std::uint64_t count);

enum class Order { kEpoch, kSequential, kReplacement, kBlock };

Order order_from_name(const std::string& name);  // throws on an unknown one

// How Order::kBlock shuffles; other orders take no notice.
struct Blocks {
  std::uint64_t tokens = std::uint64_t{1} << 23;  // of one block
  std::uint64_t pool = 8;                         // blocks whose windows are shuffled together
};

// The order of one run of tokens. The stretch of samples in use (an epoch, or a pool of blocks) is
// cached behind an atomic pointer.
class SampleOrder final : public SampleStream {
 public:
  SampleOrder(std::uint64_t n_tokens, std::uint64_t seq_len, std::uint64_t seed, Order kind,
              Blocks blocks = {});

  std::uint64_t n_tokens() const noexcept override { return n_tokens_; }
  std::uint64_t seq_len() const noexcept override { return seq_len_; }
  std::uint64_t n_windows() const noexcept { return n_windows_; }
  void starts(std::uint64_t first, std::uint64_t count, std::uint64_t* out) const override;

 private:
  struct Stretch {
    std::uint64_t begin, end;  // samples
    std::uint64_t phase;
    Permutation windows;
    std::vector<std::uint64_t> blocks;  // the first window of each; none where order is by epoch

    std::uint64_t window(std::uint64_t sample, std::uint64_t per_block) const noexcept {
      const std::uint64_t at = windows.at(sample - begin);
      return blocks.empty() ? at : blocks[at / per_block] + at % per_block;
    }
  };

  std::shared_ptr<const Stretch> stretch(std::uint64_t sample) const;
  Stretch pool(std::uint64_t epoch, std::uint64_t index, std::uint64_t phase) const;
  std::uint64_t drawn(std::uint64_t sample) const noexcept;

  std::uint64_t n_tokens_, seq_len_, seed_;
  Order kind_;
  std::uint64_t n_windows_, n_phases_, per_block_, pool_blocks_, draw_key_;
  mutable std::shared_ptr<const Stretch> cached_;  // through std::atomic_load and atomic_store only
};

}  // namespace mypt::data
