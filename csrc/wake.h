// A wake-up that the waker never waits for: no lock is shared with a sleeper that may be preempted
// while it holds it.
#pragma once

#ifdef __linux__
#include <semaphore.h>

#include <cerrno>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace mypt::data {

#ifdef __linux__
class Wake {
 public:
  Wake() { ::sem_init(&semaphore_, 0, 0); }
  ~Wake() { ::sem_destroy(&semaphore_); }
  Wake(const Wake&) = delete;
  Wake& operator=(const Wake&) = delete;

  void post() { ::sem_post(&semaphore_); }
  void wait() {
    while (::sem_wait(&semaphore_) != 0 && errno == EINTR) {
    }
  }

 private:
  sem_t semaphore_;
};
#else
class Wake {
 public:
  void post() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++count_;
    }
    there_.notify_one();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    there_.wait(lock, [this] { return count_ > 0; });
    --count_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable there_;
  int count_ = 0;
};
#endif

}  // namespace mypt::data
