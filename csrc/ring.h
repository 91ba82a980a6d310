// Batches made ahead of time: one worker fills slots that the caller owns, one consumer takes them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "batch_source.h"
#include "wake.h"

namespace mypt::data {

// Which samples batch k of a rank holds: steps of `global_batch` samples, of which the rank has
// `share` from `first` on, dealt out `rows` at a time.
struct Plan {
  std::uint64_t first;  // of batch 0
  std::uint64_t global_batch;
  std::uint64_t share;
  std::uint64_t rows;

  struct Samples {
    std::uint64_t first;
    std::size_t count;
  };
  Samples batch(std::uint64_t k) const noexcept {
    const std::uint64_t a_step = (share + rows - 1) / rows;
    const std::uint64_t done = k % a_step * rows;
    return {first + k / a_step * global_batch + done,
            static_cast<std::size_t>(share - done < rows ? share - done : rows)};
  }
};

// A slot is free, then full, then lent to the consumer, then free again. Slots are used in turn, so
// counters say it all. The worker fills while there is a free slot; then it sleeps until no more
// than `low_water` full ones are left: so it is woken every few batches, not at every one. On a busy
// machine it may be woken and not get a core: then the consumer makes its batch itself.
class Ring {
 public:
  // The slots' memory stays the caller's, who keeps it for as long as this lives.
  Ring(std::shared_ptr<const BatchSource> source, Plan plan, std::vector<Batch> slots,
       std::size_t low_water);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  struct Taken {
    std::size_t slot;
    std::uint32_t largest;  // token id
  };

  // Take the next batch, or wait for it; false if it is not there by then. Throws what the worker
  // threw, once the batches before are taken.
  bool take(std::chrono::milliseconds patience, Taken& taken);

  // For the consumer, when nothing is there: fill a slot here and now, unless the worker is at it.
  void fill_here();

  // Give back the oldest `count` lent slots.
  void release(std::size_t count);

  std::uint64_t batches_taken() const noexcept { return taken_.load(std::memory_order_relaxed); }
  std::uint64_t times_waited() const noexcept { return waits_.load(std::memory_order_relaxed); }

  // Whether this is another process than the one that made the ring: its worker is not here, and
  // it must not be destroyed.
  bool is_forked() const noexcept;

 private:
  void work();
  void fill(std::uint64_t k, bool advised, BatchSource::Work& work);
  bool claim(std::uint64_t& k);
  void advise(std::uint64_t k, BatchSource::Work& work);
  std::uint64_t full() const noexcept { return filled_.load() - taken_.load(); }
  bool has_free() const noexcept { return filled_.load() - released_.load() < slots_.size(); }
  bool is_work_due() const noexcept {
    return claimed_ == filled_ && has_free() && full() <= low_water_;
  }
  void wake_worker();

  const std::shared_ptr<const BatchSource> source_;
  const Plan plan_;
  const std::vector<Batch> slots_;
  std::vector<std::uint32_t> largest_;  // by slot
  const std::size_t low_water_;
  const std::int64_t process_;

  // Counts of batches, ever growing: whoever claims a batch fills it. The rest is the consumer's.
  alignas(64) std::atomic<std::uint64_t> claimed_{0};
  std::atomic<std::uint64_t> filled_{0};
  alignas(64) std::atomic<std::uint64_t> taken_{0};
  std::atomic<std::uint64_t> released_{0};
  std::atomic<bool> worker_sleeps_{false}, consumer_sleeps_{false}, stop_{false}, failed_{false};
  std::atomic<std::uint64_t> waits_{0};
  std::uint64_t advised_ = 0;  // batches that the worker asked the disk for
  BatchSource::Work work_;     // the consumer's

  Wake worker_wakes_;
  std::mutex mutex_;  // of failure_, and of a consumer that waits
  std::condition_variable consumer_wakes_;
  std::exception_ptr failure_;
  std::thread worker_;
};

}  // namespace mypt::data
