// A read-only memory-mapped file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace mypt::data {

// The size is captured when the file is opened. The mapping outlives the descriptor, so ten
// thousand shards cost no descriptors. A file that is truncated under the mapping still kills the
// process with SIGBUS when its lost pages are read: shards are written once and never in place.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const noexcept { return data_; }  // null for an empty file
  std::uint64_t size() const noexcept { return size_; }

 private:
  const std::byte* data_ = nullptr;
  std::uint64_t size_ = 0;
};

}  // namespace mypt::data
