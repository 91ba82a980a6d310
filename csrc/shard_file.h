// A shard's file, however its bytes are reached: mapped, read with pread, or copied into memory.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace mypt::data {

enum class Io { kMap, kRead, kMemory };

Io io_from_name(const std::string& name);  // mmap, pread or ram; throws when it is none

// Whether the file lies on a network or user-space file system, where mapping is slow or unsafe.
bool is_remote(const std::string& path);

// The share, from 0 to 1, of sampled pages of the file that are in the page cache.
double resident_share(const std::string& path);

// An open file; closed with the last user.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Which file a name stood for, and when its bytes last changed; all zero if that is not known.
struct Identity {
  std::uint64_t device = 0, inode = 0;
  std::int64_t changed_ns = 0;

  bool operator==(const Identity& other) const noexcept {
    return device == other.device && inode == other.inode && changed_ns == other.changed_ns;
  }
};

Identity identity_of(const struct stat& info);

// What a thread needs to read: room for tokens, and what tells it to give up waiting for a disk.
struct Scratch {
  std::vector<std::byte> bytes;
  const std::atomic<bool>* stop = nullptr;
};

// Opened when it is first used, so that ten thousand shards cost nothing to name; safe to share.
// The file must then be the one that was validated, whenever it is opened. Under kRead a file that
// is cut short is a DataChangedError. A mapping is looked at now and then (`check`); lost pages
// that are read before that kill the process with SIGBUS.
class ShardFile {
 public:
  ShardFile(std::string path, std::uint64_t size, const Identity& identity, Io io);
  ~ShardFile();
  ShardFile(const ShardFile&) = delete;
  ShardFile& operator=(const ShardFile&) = delete;

  // All bytes of a file under kMap or kMemory; null if it is empty.
  const std::byte* data() {
    const std::byte* known = data_.load(std::memory_order_acquire);
    return known || size_ == 0 ? known : open_data();
  }

  // Under kRead: copy bytes [offset, offset + count) to the scratch. After EIO and ESTALE the file
  // is opened again and read again, three times, with pauses of 0.1, 1 and 10 seconds.
  void read(std::uint64_t offset, std::size_t count, Scratch& scratch);

  // Under kRead: ask the system to fetch these bytes; returns at once.
  void will_need(std::uint64_t offset, std::size_t count);

  // Under kMap: give the mapped pages back; they stay in the page cache.
  void forget_pages();

  // Under kMap: throw if the file is not what it was when it was mapped. One that was replaced by
  // another of its name is still there for this process, and is no change.
  void check();

  // Under kRead: close the file until it is next used; whether it was open.
  bool rest();

  std::uint64_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  std::shared_ptr<const Descriptor> open(int& error);
  std::shared_ptr<const Descriptor> descriptor(int& error);
  const std::byte* open_data();

  const std::string path_;
  const std::uint64_t size_;
  const Io io_;
  std::mutex mutex_;  // of everything below but data_
  std::shared_ptr<const Descriptor> open_file_;
  Identity identity_;
  std::atomic<const std::byte*> data_{nullptr};
};

}  // namespace mypt::data
