#include "ring.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace mypt::data {
namespace {

// Batches whose windows the disk is asked for ahead of the one being filled: 4 were enough to hide
// a virtual disk, 64 no better than 16.
constexpr std::uint64_t kLookahead = 16;

}  // namespace

Ring::Ring(std::shared_ptr<const BatchSource> source, Plan plan, std::vector<Batch> slots,
           std::size_t low_water)
    : source_(std::move(source)),
      plan_(plan),
      slots_(std::move(slots)),
      largest_(slots_.size()),
      low_water_(low_water),
      process_(::getpid()) {
  if (slots_.size() < 2 || low_water_ >= slots_.size()) {
    throw std::invalid_argument("a ring needs two slots or more, and a low-water mark below them");
  }
  if (plan_.rows < 1 || plan_.share < 1 || plan_.share > plan_.global_batch) {
    throw std::invalid_argument("a plan needs rows, and a share of its global batch");
  }
  for (const Batch& slot : slots_) {
    if (slot.rows < std::min(plan_.rows, plan_.share) || slot.seq_len != source_->seq_len()) {
      throw std::invalid_argument("a slot is too small for a batch");
    }
  }
  worker_ = std::thread([this] { work(); });
}

Ring::~Ring() {
  stop_ = true;
  worker_wakes_.post();
  worker_.join();
}

bool Ring::is_forked() const noexcept { return process_ != ::getpid(); }

void Ring::work() {
#ifdef SCHED_BATCH
  // A worker of the normal class, woken by the consumer, would push it off a busy core.
  sched_param none{};
  ::sched_setscheduler(0, SCHED_BATCH, &none);
#endif
  BatchSource::Work work;
  work.scratch.stop = &stop_;
  try {
    while (!stop_ && !failed_) {
      std::uint64_t k;
      if (!claim(k)) {
        // A wake-up that comes after the last look is kept; one too many is a turn of this loop.
        worker_sleeps_ = true;
        if (!is_work_due()) worker_wakes_.wait();
        worker_sleeps_ = false;
        continue;
      }
      if (source_->is_read()) advise(k, work);
      fill(k, source_->is_read(), work);
      if (consumer_sleeps_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        consumer_wakes_.notify_one();
      }
    }
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    failure_ = std::current_exception();
    failed_ = true;
    consumer_wakes_.notify_one();
  }
}

// Take on the next batch, if nobody is at work on one and there is a slot for it.
bool Ring::claim(std::uint64_t& k) {
  k = filled_;
  return has_free() && claimed_.compare_exchange_strong(k, k + 1);
}

void Ring::advise(std::uint64_t k, BatchSource::Work& work) {
  for (advised_ = std::max(advised_, k); advised_ <= k + kLookahead; ++advised_) {
    const Plan::Samples ahead = plan_.batch(advised_);
    source_->advise(ahead.first, ahead.count, work);
  }
}

void Ring::fill(std::uint64_t k, bool advised, BatchSource::Work& work) {
  const Plan::Samples now = plan_.batch(k);
  Batch batch = slots_[k % slots_.size()];
  batch.rows = now.count;
  const std::uint64_t next = plan_.batch(k + 1).first;
  largest_[k % slots_.size()] = source_->read(now.first, batch, next, advised, work);
  filled_.fetch_add(1);
}

void Ring::fill_here() {
  std::uint64_t k;
  if (failed_ || full() > 0 || !claim(k)) return;
  ++waits_;
  try {
    fill(k, false, work_);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    failure_ = std::current_exception();
    failed_ = true;
  }
}

bool Ring::take(std::chrono::milliseconds patience, Taken& taken) {
  if (full() == 0) {
    if (patience.count() == 0 && !failed_) return false;
    std::unique_lock<std::mutex> lock(mutex_);
    ++waits_;
    consumer_sleeps_ = true;
    const auto there = [this] { return failed_ || full() > 0; };
    const bool came = consumer_wakes_.wait_for(lock, patience, there);
    consumer_sleeps_ = false;
    if (!came) return false;
    if (full() == 0) std::rethrow_exception(failure_);
  }
  const std::size_t slot = taken_.load() % slots_.size();
  taken = {slot, largest_[slot]};
  taken_.fetch_add(1);
  wake_worker();
  return true;
}

void Ring::release(std::size_t count) {
  if (count > taken_.load() - released_.load()) {
    throw std::invalid_argument("more slots are given back than were lent");
  }
  released_.fetch_add(count);
  wake_worker();
}

void Ring::wake_worker() {
  // Sequentially consistent on both sides: either the worker sees the new counts before it sleeps,
  // or this sees that it sleeps.
  if (is_work_due() && worker_sleeps_.exchange(false)) worker_wakes_.post();
}

}  // namespace mypt::data
