#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "errors.h"

namespace mypt::data {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

[[noreturn]] void fail(const std::string& path, const std::string& action, int error) {
  throw DataError("shard " + path, action + ": " + std::strerror(error), "");
}

int open_read_only(const std::string& path) {
  int fd;
  do {
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const Descriptor file(open_read_only(path));
  if (file.get() < 0) fail(path, "cannot be opened", errno);
  struct stat info;
  if (::fstat(file.get(), &info) != 0) fail(path, "cannot be examined", errno);
  if (!S_ISREG(info.st_mode)) throw DataError("shard " + path, "not a regular file", "");
  const auto size = static_cast<std::uint64_t>(info.st_size);
  if (size > std::numeric_limits<std::size_t>::max()) fail(path, "cannot be mapped", EFBIG);
  if (size == 0) return;  // mmap refuses a length of 0
  void* address =
      ::mmap(nullptr, static_cast<std::size_t>(size), PROT_READ, MAP_SHARED, file.get(), 0);
  if (address == MAP_FAILED) fail(path, "cannot be mapped", errno);
  data_ = static_cast<const std::byte*>(address);
  size_ = size;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), static_cast<std::size_t>(size_));
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

}  // namespace mypt::data
