// Several sources in fixed proportions: the C++ twin of mypt_fast/data/mixture.py, bit for bit.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "order.h"

namespace mypt::data {

inline constexpr const char* kMixtureAlgorithm = "mixture/v1";

// Samples up to `until` take quotas[k] of every MixtureOrder::kBlock from source k.
struct Phase {
  std::uint64_t until;  // kMaxSamples for the last one
  std::vector<std::uint32_t> quotas;
};

class MixtureOrder final : public SampleStream {
 public:
  static constexpr std::uint64_t kBlock = 1 << 16;

  // `sizes` are the tokens of each source; they lie one after another in the corpus.
  MixtureOrder(const std::vector<std::uint64_t>& sizes, std::uint64_t seq_len, std::uint64_t seed,
               Order kind, Blocks blocks, const std::vector<Phase>& phases);

  std::uint64_t n_tokens() const noexcept override { return bases_.back(); }
  std::uint64_t seq_len() const noexcept override { return seq_len_; }
  std::uint64_t n_windows() const noexcept { return n_windows_; }
  void starts(std::uint64_t first, std::uint64_t count, std::uint64_t* out) const override;

  // The number of the source of each sample.
  std::vector<std::uint64_t> sources(std::uint64_t first, std::uint64_t count) const;

 private:
  struct Stage {
    std::uint64_t begin, end, key;
    std::vector<std::uint64_t> bounds;   // source k has slots [bounds[k], bounds[k + 1])
    std::vector<std::uint64_t> already;  // samples of each source before `begin`
  };

  struct Node;

  const Stage& stage(std::uint64_t sample) const noexcept;
  template <class Leaf>
  void walk(std::uint64_t first, std::uint64_t count, const Leaf& leaf) const;
  static void count_slots(const Node& node, std::uint64_t visits,
                          std::vector<std::uint64_t>& counts);

  std::uint64_t seq_len_, leaves_ = 1, n_windows_ = 0;
  std::vector<std::uint64_t> bases_;  // one more than the sources
  std::vector<std::unique_ptr<const SampleOrder>> orders_;  // null where never used
  std::vector<Stage> stages_;
};

}  // namespace mypt::data
