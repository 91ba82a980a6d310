// Both ends of many files at once, for those that open thousands of shards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "shard_file.h"

namespace mypt::data {

struct FileEnds {
  bool is_read = false;  // false: no regular file, or the system refused; nothing below is set
  std::uint64_t size = 0;
  Identity identity;
  std::string head, tail;  // whole where the file is short, so that they may overlap
};

// The first `head` and the last `tail` bytes of each file. Several threads ask, so that a disk or
// a network answers many at a time.
std::vector<FileEnds> read_ends(const std::vector<std::string>& paths, std::size_t head,
                                std::size_t tail);

}  // namespace mypt::data
