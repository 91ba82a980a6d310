#include "permutation.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace mypt::data {
namespace {

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr std::uint64_t kEpochStride = 0xD1B54A32D192ED03;
constexpr std::uint64_t kTableLimit = 1 << 16;
constexpr std::uint64_t kPhaseKey = 7;
constexpr std::uint64_t kDrawKey = 16;
constexpr std::uint64_t kMaxWindows = std::uint64_t{1} << 62;
constexpr std::uint64_t kMaxSamples = std::numeric_limits<std::int64_t>::max();

std::uint64_t mix(std::uint64_t z) noexcept {  // the finaliser of splitmix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

std::uint64_t base_key(std::uint64_t seed, std::uint64_t epoch) noexcept {
  return mix(mix(seed + kGolden) ^ (epoch * kEpochStride + 1));
}

std::uint64_t derived_key(std::uint64_t base, std::uint64_t counter) noexcept {
  return mix(base + counter * kGolden);
}

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

SampleOrder::SampleOrder(std::uint64_t n_tokens, std::uint64_t seq_len, std::uint64_t seed,
                         Order kind)
    : n_tokens_(n_tokens), seq_len_(seq_len), seed_(seed), kind_(kind) {
  if (n_tokens > kMaxSamples || seq_len < 1 || n_tokens <= seq_len) {
    throw std::invalid_argument(std::to_string(n_tokens) + " tokens hold no window of " +
                                std::to_string(seq_len) + " + 1");
  }
  // Why these: see SampleOrder in mypt_fast/data/order.py.
  n_windows_ = std::max<std::uint64_t>(1, (n_tokens - seq_len) / seq_len);
  n_phases_ = n_tokens - n_windows_ * seq_len;
}

std::shared_ptr<const SampleOrder::Epoch> SampleOrder::epoch(std::uint64_t number) const {
  auto current = std::atomic_load(&cached_);
  if (!current || current->number != number) {
    const std::uint64_t phase = derived_key(base_key(seed_, number), kPhaseKey) % n_phases_;
    current = std::make_shared<const Epoch>(
        Epoch{number, phase, Permutation(n_windows_, seed_, number)});
    std::atomic_store(&cached_, current);
  }
  return current;
}

void SampleOrder::starts(std::uint64_t first, std::uint64_t count, std::uint64_t* out) const {
  if (first > kMaxSamples || count > kMaxSamples - first) {
    throw std::invalid_argument("samples must be in [0, 2^63)");
  }
  while (count) {
    const std::uint64_t index = first % n_windows_;
    const std::uint64_t size = std::min(count, n_windows_ - index);
    if (kind_ == Order::kSequential) {
      for (std::uint64_t i = 0; i < size; ++i) out[i] = (index + i) * seq_len_;
    } else {
      const auto shuffle = epoch(first / n_windows_);
      for (std::uint64_t i = 0; i < size; ++i) {
        out[i] = shuffle->windows.at(index + i) * seq_len_ + shuffle->phase;
      }
    }
    first += size;
    count -= size;
    out += size;
  }
}

}  // namespace mypt::data
