#include "permutation.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace mypt::data {
namespace {

constexpr std::uint64_t kTableLimit = 1 << 16;
constexpr std::uint64_t kDrawKey = 16;

int bit_length(std::uint64_t value) noexcept {
  int bits = 0;
  for (; value; value >>= 1) ++bits;
  return bits;
}

std::vector<std::uint16_t> shuffled(std::uint64_t n, std::uint64_t base) {
  std::vector<std::uint16_t> table(n);
  for (std::uint64_t i = 0; i < n; ++i) table[i] = static_cast<std::uint16_t>(i);
  for (std::uint64_t i = n - 1; i > 0; --i) {
    const std::uint64_t draw = derived_key(base, kDrawKey + i) >> 32;
    std::swap(table[i], table[(draw * (i + 1)) >> 32]);
  }
  return table;
}

}  // namespace

Permutation::Permutation(std::uint64_t n, std::uint64_t seed, std::uint64_t epoch) : n_(n) {
  if (n < 1 || n > kMaxWindows) {
    throw std::invalid_argument("a permutation needs 1 <= n <= 2^62, not " + std::to_string(n));
  }
  const std::uint64_t base = base_key(seed, epoch);
  half_ = (bit_length(n - 1) + 1) / 2;
  for (int r = 0; r < kRounds; ++r) keys_[r] = derived_key(base, static_cast<std::uint64_t>(r) + 1);
  if (n < kTableLimit) table_ = shuffled(n, base);
}

std::uint64_t Permutation::inverse(std::uint64_t value) const noexcept {
  if (!table_.empty()) {
    const auto found = std::find(table_.begin(), table_.end(), value);
    return static_cast<std::uint64_t>(found - table_.begin());
  }
  do {
    value = decrypt(value);
  } while (value >= n_);
  return value;
}

std::uint64_t Permutation::encrypt(std::uint64_t value) const noexcept {
  std::uint64_t left = value >> half_;
  std::uint64_t right = value & ((std::uint64_t{1} << half_) - 1);
  for (const std::uint64_t key : keys_) {
    const std::uint64_t next = left ^ (mix(right + key) >> (64 - half_));
    left = right;
    right = next;
  }
  return (left << half_) | right;
}

std::uint64_t Permutation::decrypt(std::uint64_t value) const noexcept {
  std::uint64_t left = value >> half_;
  std::uint64_t right = value & ((std::uint64_t{1} << half_) - 1);
  for (auto key = keys_.rbegin(); key != keys_.rend(); ++key) {
    const std::uint64_t before = right ^ (mix(left + *key) >> (64 - half_));
    right = left;
    left = before;
  }
  return (left << half_) | right;
}

}  // namespace mypt::data
