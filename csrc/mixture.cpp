#include "mixture.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace mypt::data {
namespace {

constexpr std::uint64_t kSourceKey = 10;
constexpr std::uint64_t kSlotKey = 11;
constexpr std::uint64_t kMaxSources = 1 << 16;

}  // namespace

// A node of the tree over the sources. Of its `total` samples in a block exactly `left` are of its
// left half; of the first `visits`, (visits * left + offset) / total are.
struct MixtureOrder::Node {
  Node(const Stage& stage, std::uint64_t key, std::uint64_t number, std::uint64_t low,
       std::uint64_t leaves) noexcept
      : stage(stage), key(key), number(number), low(low), leaves(leaves) {
    if (leaves == 1) return;
    total = stage.bounds[low + leaves] - stage.bounds[low];
    left = stage.bounds[low + leaves / 2] - stage.bounds[low];
    offset = ((derived_key(key, number) >> 32) * total) >> 32;
  }

  Node left_half() const noexcept { return {stage, key, 2 * number, low, leaves / 2}; }
  Node right_half() const noexcept {
    return {stage, key, 2 * number + 1, low + leaves / 2, leaves / 2};
  }

  // Hand the samples at `positions`, the node's from `visit` on, to the sources they are of:
  // leaf(source, visit, positions, count). The positions are put in order of source.
  template <class Leaf>
  void hand_down(std::uint64_t visit, std::uint32_t* positions, std::size_t count,
                 std::uint32_t* scratch, const Leaf& leaf) const {
    if (count == 0) return;
    if (leaves == 1) return leaf(low, visit, positions, count);
    const std::uint64_t before = (visit * left + offset) / total;
    std::uint64_t rest = (visit * left + offset) % total;
    std::size_t to_left = 0, to_right = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint32_t position = positions[i];
      rest += left;
      const bool goes_left = rest >= total;
      rest -= goes_left ? total : 0;
      positions[to_left] = position;
      scratch[to_right] = position;
      to_left += goes_left;
      to_right += !goes_left;
    }
    std::copy(scratch, scratch + to_right, positions + to_left);
    left_half().hand_down(before, positions, to_left, scratch, leaf);
    right_half().hand_down(visit - before, positions + to_left, to_right, scratch, leaf);
  }

  const Stage& stage;
  std::uint64_t key, number, low, leaves;
  std::uint64_t total = 0, left = 0, offset = 0;
};

MixtureOrder::MixtureOrder(const std::vector<std::uint64_t>& sizes, std::uint64_t seq_len,
                           std::uint64_t seed, Order kind, Blocks blocks,
                           const std::vector<Phase>& phases)
    : seq_len_(seq_len), bases_{0} {
  const std::size_t K = sizes.size();
  if (K < 1 || K > kMaxSources) throw std::invalid_argument("a mixture has 1 to 65536 sources");
  if (phases.empty() || phases.back().until != kMaxSamples) {
    throw std::invalid_argument("the last phase of a mixture must have no end");
  }
  for (const std::uint64_t size : sizes) {
    if (size > kMaxWindows - bases_.back()) throw std::invalid_argument("more than 2^62 tokens");
    bases_.push_back(bases_.back() + size);
  }
  while (leaves_ < K) leaves_ *= 2;

  std::vector<bool> used(K);
  std::vector<std::uint64_t> already(K);
  std::uint64_t begin = 0;
  for (const Phase& phase : phases) {
    if (phase.until <= begin) throw std::invalid_argument("the phases must end one after another");
    Stage now{begin, phase.until, 0, {0}, already};
    now.key = derived_key(base_key(seed, stages_.size()), kSlotKey);
    for (const std::uint32_t quota : phase.quotas) now.bounds.push_back(now.bounds.back() + quota);
    if (phase.quotas.size() != K || now.bounds.back() != kBlock) {
      throw std::invalid_argument("the quotas of a phase, one per source, must sum to 65536");
    }
    now.bounds.resize(leaves_ + 1, kBlock);
    const std::uint64_t whole = (phase.until - begin) / kBlock;
    for (std::size_t k = 0; k < K; ++k) {
      already[k] += whole * phase.quotas[k];
      if (phase.quotas[k]) used[k] = true;
    }
    const Node root(now, base_key(now.key, whole), 1, 0, leaves_);
    count_slots(root, (phase.until - begin) % kBlock, already);
    stages_.push_back(std::move(now));
    begin = phase.until;
  }

  orders_.resize(K);
  for (std::size_t k = 0; k < K; ++k) {
    if (!used[k]) continue;
    const std::uint64_t own = derived_key(base_key(seed, k), kSourceKey);
    orders_[k] = std::make_unique<const SampleOrder>(sizes[k], seq_len, own, kind, blocks);
    n_windows_ += orders_[k]->n_windows();
  }
}

// Add to `counts` how often each source below a node comes in the node's first `visits`.
void MixtureOrder::count_slots(const Node& node, std::uint64_t visits,
                               std::vector<std::uint64_t>& counts) {
  if (visits == 0) return;
  if (node.leaves == 1) {
    counts[node.low] += visits;
    return;
  }
  const std::uint64_t left = (visits * node.left + node.offset) / node.total;
  count_slots(node.left_half(), left, counts);
  count_slots(node.right_half(), visits - left, counts);
}

const MixtureOrder::Stage& MixtureOrder::stage(std::uint64_t sample) const noexcept {
  const auto next =
      std::upper_bound(stages_.begin(), stages_.end(), sample,
                       [](std::uint64_t value, const Stage& s) { return value < s.begin; });
  return *std::prev(next);
}

// Call leaf(source, its first sample, done, positions, count) for the sources in [first, first +
// count), block by block: sample first + done + positions[i] is its (first sample + i)-th one.
template <class Leaf>
void MixtureOrder::walk(std::uint64_t first, std::uint64_t count, const Leaf& leaf) const {
  std::vector<std::uint32_t> positions(std::min(count, kBlock)), scratch(positions.size());
  for (std::uint64_t done = 0; done < count;) {
    const Stage& now = stage(first + done);
    const std::uint64_t block = (first + done - now.begin) / kBlock;
    const std::uint64_t visit = (first + done - now.begin) % kBlock;
    const std::uint64_t size =
        std::min({count - done, kBlock - visit, now.end - (first + done)});
    std::iota(positions.begin(), positions.begin() + static_cast<std::ptrdiff_t>(size), 0);
    Node(now, base_key(now.key, block), 1, 0, leaves_)
        .hand_down(visit, positions.data(), size, scratch.data(),
                   [&](std::uint64_t k, std::uint64_t visits, const std::uint32_t* at,
                       std::size_t n) {
                     const std::uint64_t quota = now.bounds[k + 1] - now.bounds[k];
                     leaf(k, now.already[k] + block * quota + visits, done, at, n);
                   });
    done += size;
  }
}

void MixtureOrder::starts(std::uint64_t first, std::uint64_t count, std::uint64_t* out) const {
  check_samples(first, count);
  std::vector<std::uint64_t> own(std::min(count, kBlock));
  walk(first, count, [&](std::uint64_t k, std::uint64_t local, std::uint64_t done,
                         const std::uint32_t* at, std::size_t n) {
    orders_[k]->starts(local, n, own.data());
    for (std::size_t i = 0; i < n; ++i) out[done + at[i]] = bases_[k] + own[i];
  });
}

std::vector<std::uint64_t> MixtureOrder::sources(std::uint64_t first, std::uint64_t count) const {
  check_samples(first, count);
  std::vector<std::uint64_t> out(count);
  walk(first, count,
       [&](std::uint64_t k, std::uint64_t, std::uint64_t done, const std::uint32_t* at,
           std::size_t n) {
         for (std::size_t i = 0; i < n; ++i) out[done + at[i]] = k;
       });
  return out;
}

}  // namespace mypt::data
