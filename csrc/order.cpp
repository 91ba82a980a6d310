#include "order.h"

#include <algorithm>
#include <stdexcept>

namespace mypt::data {
namespace {

constexpr std::uint64_t kPhaseKey = 7;
constexpr std::uint64_t kReplacementKey = 8;
constexpr std::uint64_t kBlockKey = 9;
constexpr std::uint64_t kMaxBlockTokens = std::uint64_t{1} << 40;
constexpr std::uint64_t kMaxPool = 1 << 16;

std::uint64_t divide_up(std::uint64_t a, std::uint64_t b) noexcept { return a / b + (a % b != 0); }

}  // namespace

void check_samples(std::uint64_t first, std::uint64_t count) {
  if (first > kMaxSamples || count > kMaxSamples - first) {
    throw std::invalid_argument("samples must be in [0, 2^63)");
  }
}

Order order_from_name(const std::string& name) {
  if (name == "epoch") return Order::kEpoch;
  if (name == "sequential") return Order::kSequential;
  if (name == "replacement") return Order::kReplacement;
  if (name == "block") return Order::kBlock;
  throw std::invalid_argument("order is one of epoch, sequential, replacement, block, not '" +
                              name + "'");
}

SampleOrder::SampleOrder(std::uint64_t n_tokens, std::uint64_t seq_len, std::uint64_t seed,
                         Order kind, Blocks blocks)
    : n_tokens_(n_tokens), seq_len_(seq_len), seed_(seed), kind_(kind) {
  if (n_tokens > kMaxWindows || seq_len < 1 || n_tokens <= seq_len) {
    throw std::invalid_argument(std::to_string(n_tokens) + " tokens hold no window of " +
                                std::to_string(seq_len) + " + 1");
  }
  if (blocks.tokens < 1 || blocks.tokens > kMaxBlockTokens || blocks.pool < 1 ||
      blocks.pool > kMaxPool) {
    throw std::invalid_argument("a block has 1 to 2^40 tokens and a pool 1 to 65536 blocks");
  }
  // Why these: see SampleOrder in mypt_fast/data/order.py.
  n_windows_ = std::max<std::uint64_t>(1, (n_tokens - seq_len) / seq_len);
  n_phases_ = n_tokens - n_windows_ * seq_len;
  per_block_ = std::max<std::uint64_t>(1, blocks.tokens / seq_len);
  pool_blocks_ = blocks.pool;
  draw_key_ = derived_key(base_key(seed, 0), kReplacementKey);
}

// A window start uniform over all, without the bias of a plain remainder.
std::uint64_t SampleOrder::drawn(std::uint64_t sample) const noexcept {
  const std::uint64_t n = n_tokens_ - seq_len_;
  const std::uint64_t last = ~((0 - n) % n);  // 2^64 - 1 - (2^64 mod n)
  const std::uint64_t key = derived_key(draw_key_, sample);
  std::uint64_t word = mix(key);
  for (std::uint64_t attempt = 1; word > last; ++attempt) word = mix(key + attempt * kEpochStride);
  return word % n;
}

// The pool that holds window `index` of the epoch. All but the last block of the corpus are full;
// that one lies anywhere in the shuffled order, and pools after its own begin earlier.
SampleOrder::Stretch SampleOrder::pool(std::uint64_t epoch, std::uint64_t index,
                                       std::uint64_t phase) const {
  const std::uint64_t key = derived_key(base_key(seed_, epoch), kBlockKey);
  const std::uint64_t n_blocks = divide_up(n_windows_, per_block_);
  const std::uint64_t missing = n_blocks * per_block_ - n_windows_;
  const std::uint64_t full = per_block_ * pool_blocks_;
  const Permutation order(n_blocks, key, 0);
  const std::uint64_t short_at = order.inverse(n_blocks - 1);
  const std::uint64_t short_pool = short_at / pool_blocks_;

  const bool after = index >= (short_pool + 1) * full - missing;
  const std::uint64_t number = (index + (after ? missing : 0)) / full;
  const std::uint64_t begin = number * full - (number > short_pool ? missing : 0);
  const std::uint64_t end =
      std::min(n_windows_, (number + 1) * full - (number >= short_pool ? missing : 0));

  std::vector<std::uint64_t> blocks;
  for (std::uint64_t i = number * pool_blocks_;
       i < std::min(n_blocks, (number + 1) * pool_blocks_); ++i) {
    blocks.push_back(order.at(i) * per_block_);
  }
  if (number == short_pool) std::swap(blocks[short_at % pool_blocks_], blocks.back());
  const std::uint64_t first = epoch * n_windows_;
  return {first + begin, first + end, phase, Permutation(end - begin, key, number + 1),
          std::move(blocks)};
}

std::shared_ptr<const SampleOrder::Stretch> SampleOrder::stretch(std::uint64_t sample) const {
  auto current = std::atomic_load(&cached_);
  if (!current || sample < current->begin || sample >= current->end) {
    const std::uint64_t epoch = sample / n_windows_;
    const std::uint64_t begin = epoch * n_windows_;
    const std::uint64_t phase = derived_key(base_key(seed_, epoch), kPhaseKey) % n_phases_;
    current = std::make_shared<const Stretch>(
        kind_ == Order::kBlock
            ? pool(epoch, sample - begin, phase)
            : Stretch{begin, begin + n_windows_, phase, Permutation(n_windows_, seed_, epoch), {}});
    std::atomic_store(&cached_, current);
  }
  return current;
}

void SampleOrder::starts(std::uint64_t first, std::uint64_t count, std::uint64_t* out) const {
  check_samples(first, count);
  if (kind_ == Order::kReplacement) {
    for (std::uint64_t i = 0; i < count; ++i) out[i] = drawn(first + i);
    return;
  }
  if (kind_ == Order::kSequential) {
    for (std::uint64_t i = 0; i < count; ++i) out[i] = (first + i) % n_windows_ * seq_len_;
    return;
  }
  while (count) {
    const auto now = stretch(first);
    const std::uint64_t size = std::min(count, now->end - first);
    for (std::uint64_t i = 0; i < size; ++i) {
      out[i] = now->window(first + i, per_block_) * seq_len_ + now->phase;
    }
    first += size;
    count -= size;
    out += size;
  }
}

}  // namespace mypt::data
