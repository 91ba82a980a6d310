#include "shard_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/vfs.h>
#endif

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>

#include "errors.h"

namespace mypt::data {
namespace {

constexpr std::size_t kPiece = std::size_t{8} << 20;  // how much of a file is copied at a time

[[noreturn]] void fail(const std::string& path, const std::string& action, int error) {
  throw DataError("shard " + path, action + ": " + std::strerror(error), "");
}

[[noreturn]] void changed(const std::string& path, const std::string& found) {
  throw DataChangedError("shard " + path, found,
                         "stop and start again: a run goes on if its data is the same");
}

int open_read_only(const std::string& path) {
  int fd;
  do {
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

std::int64_t changed_ns(const struct stat& info) {
#ifdef __APPLE__
  const timespec& when = info.st_mtimespec;
#else
  const timespec& when = info.st_mtim;
#endif
  return std::int64_t{when.tv_sec} * 1'000'000'000 + when.tv_nsec;
}

// Reads count bytes, or as many as there are before the end of the file, or before an error.
std::size_t read_fully(int fd, std::uint64_t offset, std::size_t count, std::byte* out,
                       int& error) {
  std::size_t done = 0;
  while (done < count) {
    const ssize_t got = ::pread(fd, out + done, count - done, static_cast<off_t>(offset + done));
    if (got == 0) break;
    if (got > 0) {
      done += static_cast<std::size_t>(got);
    } else if (errno != EINTR) {
      error = errno;
      break;
    }
  }
  return done;
}

void pause(std::chrono::milliseconds length, const std::atomic<bool>* stop) {
  constexpr std::chrono::milliseconds kLook(20);
  for (; length.count() > 0 && !(stop && *stop); length -= kLook) {
    std::this_thread::sleep_for(std::min(length, kLook));
  }
}

#ifdef __linux__
bool is_resident_by_map(int fd, std::uint64_t at, std::size_t page) {
  void* mapped = ::mmap(nullptr, page, PROT_READ, MAP_SHARED, fd, static_cast<off_t>(at));
  if (mapped == MAP_FAILED) return false;
  unsigned char state = 0;
  const bool known = ::mincore(mapped, page, &state) == 0;
  ::munmap(mapped, page);
  return known && (state & 1);
}

bool is_resident_by_read(int fd, std::uint64_t at) {
  char byte;
  iovec one{&byte, 1};
  return ::preadv2(fd, &one, 1, static_cast<off_t>(at), RWF_NOWAIT) == 1;
}
#endif

}  // namespace

Io io_from_name(const std::string& name) {
  if (name == "mmap") return Io::kMap;
  if (name == "pread") return Io::kRead;
  if (name == "ram") return Io::kMemory;
  throw std::invalid_argument("io is one of mmap, pread, ram, not '" + name + "'");
}

bool is_remote(const std::string& path) {
#ifdef __linux__
  struct statfs info;
  if (::statfs(path.c_str(), &info) != 0) return false;
  // NFS, SMB, CIFS, SMB2, FUSE, 9P, Lustre, Ceph, AFS, GPFS, BeeGFS (statfs(2) and their drivers)
  constexpr std::array<std::uint32_t, 11> kRemote = {
      0x6969,     0x517B,     0xFF534D42, 0xFE534D42, 0x65735546, 0x01021997,
      0x0BD00BD0, 0x00C36400, 0x5346414F, 0x47504653, 0x19830326};
  const auto type = static_cast<std::uint32_t>(info.f_type);
  return std::find(kRemote.begin(), kRemote.end(), type) != kRemote.end();
#else
  (void)path;
  return false;
#endif
}

double resident_share(const std::string& path) {
#ifdef __linux__
  const Descriptor file(open_read_only(path));
  struct stat info;
  if (file.get() < 0 || ::fstat(file.get(), &info) != 0 || info.st_size == 0) return 0;
  ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_RANDOM);
  // mincore calls everything resident in a file that the user neither owns nor can write. A read
  // that does not wait tells the truth there, but starts to fetch the page: so never the same ones.
  const bool is_told =
      ::geteuid() == 0 || ::geteuid() == info.st_uid || ::access(path.c_str(), W_OK) == 0;
  std::mt19937_64 draw{std::random_device{}()};
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t pages = (static_cast<std::uint64_t>(info.st_size) + page - 1) / page;
  constexpr std::uint64_t kSamples = 64;
  std::uint64_t there = 0;
  for (std::uint64_t i = 0; i < kSamples; ++i) {
    const std::uint64_t at = draw() % pages * page;
    there += is_told ? is_resident_by_map(file.get(), at, static_cast<std::size_t>(page))
                     : is_resident_by_read(file.get(), at);
  }
  return static_cast<double>(there) / static_cast<double>(kSamples);
#else
  (void)path;
  return 1;
#endif
}

Identity identity_of(const struct stat& info) {
  return {static_cast<std::uint64_t>(info.st_dev), static_cast<std::uint64_t>(info.st_ino),
          changed_ns(info)};
}

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

ShardFile::ShardFile(std::string path, std::uint64_t size, const Identity& identity, Io io)
    : path_(std::move(path)), size_(size), io_(io), identity_(identity) {
  if (size_ > static_cast<std::uint64_t>(std::numeric_limits<std::ptrdiff_t>::max())) {
    fail(path_, "cannot be mapped", EFBIG);
  }
}

ShardFile::~ShardFile() {
  if (const std::byte* data = data_.load()) {
    ::munmap(const_cast<std::byte*>(data), static_cast<std::size_t>(size_));
  }
}

std::shared_ptr<const Descriptor> ShardFile::open(int& error) {
  auto file = std::make_shared<const Descriptor>(open_read_only(path_));
  struct stat info;
  if (file->get() < 0 || ::fstat(file->get(), &info) != 0) {
    error = errno;
    return nullptr;
  }
  if (!S_ISREG(info.st_mode)) throw DataError("shard " + path_, "not a regular file", "");
  if (static_cast<std::uint64_t>(info.st_size) != size_) {
    changed(path_, std::to_string(info.st_size) + " bytes, where " + std::to_string(size_) +
                       " were validated");
  }
  const Identity now = identity_of(info);
  if (!(identity_ == Identity{}) && !(now == identity_)) {
    changed(path_, "another file, or another time of change, than when it was validated");
  }
  identity_ = now;
  return file;
}

std::shared_ptr<const Descriptor> ShardFile::descriptor(int& error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!open_file_ && (open_file_ = open(error))) {
#ifdef __linux__
    // Windows are read at random: what the system would read ahead of them is not wanted.
    ::posix_fadvise(open_file_->get(), 0, 0, POSIX_FADV_RANDOM);
#endif
  }
  return open_file_;
}

bool ShardFile::rest() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool was_open = open_file_ != nullptr;
  open_file_.reset();
  return was_open;
}

const std::byte* ShardFile::open_data() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const std::byte* known = data_.load(std::memory_order_relaxed)) return known;
  int error = 0;
  const auto file = open(error);
  if (!file) fail(path_, "cannot be opened", error);
  const auto size = static_cast<std::size_t>(size_);
  if (io_ == Io::kMap) {
    void* address = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file->get(), 0);
    if (address == MAP_FAILED) fail(path_, "cannot be mapped", errno);
#ifdef __linux__
    // The default reads megabytes around each fault: a thousand times what a window needs.
    ::madvise(address, size, MADV_RANDOM);
#endif
    data_.store(static_cast<const std::byte*>(address), std::memory_order_release);
    return static_cast<const std::byte*>(address);
  }
  void* address =
      ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) fail(path_, "does not fit into memory", errno);
#ifdef __linux__
  ::madvise(address, size, MADV_HUGEPAGE);
#endif
  auto* bytes = static_cast<std::byte*>(address);
  try {
    for (std::size_t at = 0; at < size; at += kPiece) {
      const std::size_t count = std::min(kPiece, size - at);
      const std::size_t done = read_fully(file->get(), at, count, bytes + at, error);
      if (error) fail(path_, "cannot be read at byte " + std::to_string(at + done), error);
      if (done != count) changed(path_, "ended early while it was copied into memory");
    }
  } catch (...) {
    ::munmap(address, size);
    throw;
  }
  data_.store(bytes, std::memory_order_release);
  return bytes;
}

void ShardFile::read(std::uint64_t offset, std::size_t count, Scratch& scratch) {
  // A disk or a server that is away for a moment must not end a run of weeks.
  constexpr std::array<int, 3> kPausesMs = {100, 1000, 10'000};
  if (scratch.bytes.size() < count) scratch.bytes.resize(count);
  for (std::size_t failures = 0;; ++failures) {
    int error = 0;
    std::size_t done = 0;
    if (const auto file = descriptor(error)) {
      done = read_fully(file->get(), offset, count, scratch.bytes.data(), error);
    }
    if (!error) {
      if (done == count) return;
      changed(path_, "ends at byte " + std::to_string(offset + done) + ", where " +
                         std::to_string(size_) + " bytes were validated");
    }
    const bool is_away = error == EIO || error == ESTALE;
    if (!is_away || failures == kPausesMs.size() || (scratch.stop && *scratch.stop)) {
      fail(path_, "cannot be read at byte " + std::to_string(offset + done), error);
    }
    pause(std::chrono::milliseconds(kPausesMs[failures]), scratch.stop);
    rest();  // a stale handle stays stale
  }
}

void ShardFile::will_need(std::uint64_t offset, std::size_t count) {
#ifdef __linux__
  int error = 0;  // whoever reads says so
  if (const auto file = descriptor(error)) {
    ::posix_fadvise(file->get(), static_cast<off_t>(offset), static_cast<off_t>(count),
                    POSIX_FADV_WILLNEED);
  }
#else
  (void)offset;
  (void)count;
#endif
}

void ShardFile::check() {
  if (io_ != Io::kMap || !data_.load(std::memory_order_acquire)) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  struct stat info;
  if (::stat(path_.c_str(), &info) != 0) return;  // removed: the mapping keeps the file
  if (static_cast<std::uint64_t>(info.st_dev) != identity_.device ||
      static_cast<std::uint64_t>(info.st_ino) != identity_.inode) {
    return;
  }
  if (static_cast<std::uint64_t>(info.st_size) != size_ ||
      changed_ns(info) != identity_.changed_ns) {
    changed(path_, std::to_string(info.st_size) + " bytes, changed since it was mapped with " +
                       std::to_string(size_));
  }
}

void ShardFile::forget_pages() {
#ifdef __linux__
  if (io_ != Io::kMap) return;
  if (const std::byte* data = data_.load(std::memory_order_acquire)) {
    ::madvise(const_cast<std::byte*>(data), static_cast<std::size_t>(size_), MADV_DONTNEED);
  }
#endif
}

}  // namespace mypt::data
