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

// Of the first `visits` of a node, how many went left: exactly `left` of every `total`.
struct Split {
  std::uint64_t left, total, offset;

  std::uint64_t before(std::uint64_t visits) const noexcept {
    return (visits * left + offset) / total;
  }
};

Split split_of(const std::vector<std::uint64_t>& bounds, std::uint64_t key, std::uint64_t node,
               std::uint64_t low, std::uint64_t leaves) noexcept {
  const std::uint64_t total = bounds[low + leaves] - bounds[low];
  const std::uint64_t draw = derived_key(key, node) >> 32;
  return {bounds[low + leaves / 2] - bounds[low], total, (draw * total) >> 32};
}

}  // namespace

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
    count_slots(now, base_key(now.key, whole), 1, 0, leaves_, (phase.until - begin) % kBlock,
                already);
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
void MixtureOrder::count_slots(const Stage& stage, std::uint64_t key, std::uint64_t node,
                               std::uint64_t low, std::uint64_t leaves, std::uint64_t visits,
                               std::vector<std::uint64_t>& counts) const {
  if (visits == 0) return;
  if (leaves == 1) {
    counts[low] += visits;
    return;
  }
  const std::uint64_t left = split_of(stage.bounds, key, node, low, leaves).before(visits);
  const std::uint64_t half = leaves / 2;
  count_slots(stage, key, 2 * node, low, half, left, counts);
  count_slots(stage, key, 2 * node + 1, low + half, half, visits - left, counts);
}

const MixtureOrder::Stage& MixtureOrder::stage(std::uint64_t sample) const noexcept {
  const auto next =
      std::upper_bound(stages_.begin(), stages_.end(), sample,
                       [](std::uint64_t value, const Stage& s) { return value < s.begin; });
  return *std::prev(next);
}

MixtureOrder::Place MixtureOrder::place(const Stage& stage, std::uint64_t sample) const noexcept {
  const std::uint64_t block = (sample - stage.begin) / kBlock;
  std::uint64_t visit = (sample - stage.begin) % kBlock;
  const std::uint64_t key = base_key(stage.key, block);
  std::uint64_t low = 0, node = 1;
  for (std::uint64_t leaves = leaves_; leaves > 1; leaves /= 2) {
    const Split split = split_of(stage.bounds, key, node, low, leaves);
    const std::uint64_t before = split.before(visit);
    const bool right = split.before(visit + 1) == before;
    visit = right ? visit - before : before;
    low += right ? leaves / 2 : 0;
    node = 2 * node + (right ? 1 : 0);
  }
  const std::uint64_t quota = stage.bounds[low + 1] - stage.bounds[low];
  return {static_cast<std::uint32_t>(low), stage.already[low] + block * quota + visit};
}

void MixtureOrder::starts(std::uint64_t first, std::uint64_t count, std::uint64_t* out) const {
  check_samples(first, count);
  // The samples of one source within a run are consecutive ones of its own order.
  std::vector<std::uint32_t> source(count);
  std::vector<std::uint64_t> begin(orders_.size()), seen(orders_.size());
  const Stage* now = nullptr;
  for (std::uint64_t i = 0; i < count; ++i) {
    if (!now || first + i >= now->end) now = &stage(first + i);
    const Place at = place(*now, first + i);
    source[i] = at.source;
    if (seen[at.source]++ == 0) begin[at.source] = at.local;
  }
  std::vector<std::uint64_t> flat(count), next(orders_.size());
  std::exclusive_scan(seen.begin(), seen.end(), next.begin(), std::uint64_t{0});
  for (std::size_t k = 0; k < orders_.size(); ++k) {
    if (seen[k]) orders_[k]->starts(begin[k], seen[k], flat.data() + next[k]);
  }
  for (std::uint64_t i = 0; i < count; ++i) out[i] = bases_[source[i]] + flat[next[source[i]]++];
}

std::vector<std::uint64_t> MixtureOrder::sources(std::uint64_t first, std::uint64_t count) const {
  check_samples(first, count);
  std::vector<std::uint64_t> out(count);
  for (std::uint64_t i = 0; i < count; ++i) out[i] = place(stage(first + i), first + i).source;
  return out;
}

}  // namespace mypt::data
