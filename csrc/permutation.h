// Which window is sample i: the C++ twin of mypt_fast/data/order.py, bit for bit.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace mypt::data {

inline constexpr const char* kAlgorithm = "feistel6/v1";

// A permutation of [0, n) fixed by (seed, epoch). n < 2^16: a Fisher-Yates table. Above: a balanced
// Feistel network with cycle walking, O(1) memory.
class Permutation {
 public:
  Permutation(std::uint64_t n, std::uint64_t seed, std::uint64_t epoch);

  std::uint64_t n() const noexcept { return n_; }

  std::uint64_t at(std::uint64_t index) const noexcept {  // index < n
    if (!table_.empty()) return table_[index];
    do {
      index = encrypt(index);
    } while (index >= n_);
    return index;
  }

 private:
  static constexpr int kRounds = 6;

  std::uint64_t encrypt(std::uint64_t value) const noexcept;

  std::uint64_t n_;
  int half_;  // bits of one half
  std::array<std::uint64_t, kRounds> keys_;
  std::vector<std::uint16_t> table_;
};

enum class Order { kEpoch, kSequential };

// Maps a global sample number to the first token of its window. Immutable to its users; the
// current epoch's permutation is cached behind an atomic pointer, so readers may share it.
class SampleOrder {
 public:
  SampleOrder(std::uint64_t n_tokens, std::uint64_t seq_len, std::uint64_t seed, Order kind);

  std::uint64_t n_tokens() const noexcept { return n_tokens_; }
  std::uint64_t seq_len() const noexcept { return seq_len_; }
  std::uint64_t n_windows() const noexcept { return n_windows_; }

  // Write the starts of samples [first, first + count); throws when that leaves [0, 2^63).
  void starts(std::uint64_t first, std::uint64_t count, std::uint64_t* out) const;

 private:
  struct Epoch {
    std::uint64_t number;
    std::uint64_t phase;
    Permutation windows;
  };

  std::shared_ptr<const Epoch> epoch(std::uint64_t number) const;

  std::uint64_t n_tokens_, seq_len_, seed_;
  Order kind_;
  std::uint64_t n_windows_, n_phases_;
  mutable std::shared_ptr<const Epoch> cached_;  // through std::atomic_load and atomic_store only
};

}  // namespace mypt::data
