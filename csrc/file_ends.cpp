#include "file_ends.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <thread>

namespace mypt::data {
namespace {

constexpr std::size_t kThreads = 8;
constexpr std::size_t kFilesPerThread = 32;  // fewer are not worth starting one

std::string read_at(int fd, std::uint64_t offset, std::size_t count) {
  std::string bytes(count, '\0');
  const ssize_t got = ::pread(fd, bytes.data(), count, static_cast<off_t>(offset));
  bytes.resize(got < 0 ? 0 : static_cast<std::size_t>(got));
  return bytes;
}

FileEnds ends_of(const std::string& path, std::size_t head, std::size_t tail) {
  FileEnds ends;
  if (path.find('\0') != std::string::npos) return ends;  // the system would open a shorter name
  // Without O_NONBLOCK the opening of a named pipe waits for a writer that may never come.
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info;
  if (file.get() < 0 || ::fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode)) return ends;
  ends.size = static_cast<std::uint64_t>(info.st_size);
  ends.identity = identity_of(info);
  head = static_cast<std::size_t>(std::min<std::uint64_t>(head, ends.size));
  tail = static_cast<std::size_t>(std::min<std::uint64_t>(tail, ends.size));
  ends.head = read_at(file.get(), 0, head);
  ends.tail = read_at(file.get(), ends.size - tail, tail);
  ends.is_read = ends.head.size() == head && ends.tail.size() == tail;
  return ends;
}

}  // namespace

std::vector<FileEnds> read_ends(const std::vector<std::string>& paths, std::size_t head,
                                std::size_t tail) {
  std::vector<FileEnds> all(paths.size());
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < paths.size();) {
      try {
        all[i] = ends_of(paths[i], head, tail);
      } catch (const std::bad_alloc&) {  // the caller reads it alone, and says what is wrong
      }
    }
  };
  std::vector<std::thread> others;
  const std::size_t wanted = std::min(kThreads, paths.size() / kFilesPerThread);
  others.reserve(wanted);
  try {
    while (others.size() + 1 < wanted) others.emplace_back(work);
  } catch (const std::exception&) {  // no more threads to be had, or no memory for one
  }
  work();
  for (std::thread& other : others) other.join();
  return all;
}

}  // namespace mypt::data
