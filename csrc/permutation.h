// Keyed permutations: the C++ twin of Permutation in mypt_fast/data/order.py, bit for bit.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace mypt::data {

inline constexpr const char* kAlgorithm = "feistel6/v1";
inline constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15;
inline constexpr std::uint64_t kEpochStride = 0xD1B54A32D192ED03;
inline constexpr std::uint64_t kMaxWindows = std::uint64_t{1} << 62;

inline std::uint64_t mix(std::uint64_t z) noexcept {  // the finaliser of splitmix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

inline std::uint64_t base_key(std::uint64_t seed, std::uint64_t epoch) noexcept {
  return mix(mix(seed + kGolden) ^ (epoch * kEpochStride + 1));
}

inline std::uint64_t derived_key(std::uint64_t base, std::uint64_t counter) noexcept {
  return mix(base + counter * kGolden);
}

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

  // The index whose image is `value` < n: O(n) below 2^16, as fast as `at` above.
  std::uint64_t inverse(std::uint64_t value) const noexcept;

 private:
  static constexpr int kRounds = 6;

  std::uint64_t encrypt(std::uint64_t value) const noexcept;
  std::uint64_t decrypt(std::uint64_t value) const noexcept;

  std::uint64_t n_;
  int half_;  // bits of one half
  std::array<std::uint64_t, kRounds> keys_;
  std::vector<std::uint16_t> table_;
};

}  // namespace mypt::data
