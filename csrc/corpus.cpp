#include "corpus.h"

#include <limits>
#include <stdexcept>

#include "errors.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "token shards are little-endian; this machine needs the NumPy loader"
#endif

namespace mypt::data {
namespace {

// Positions are handed to Python and to int64 arrays, so they stay below 2^63.
constexpr std::uint64_t kMaxTokens = std::numeric_limits<std::int64_t>::max();

void check_width(int width) {
  if (width != 2 && width != 4) {
    throw std::invalid_argument("a token is 2 or 4 bytes wide, not " + std::to_string(width));
  }
}

}  // namespace

void Corpus::add_file(const std::string& path, int width, std::uint64_t n_tokens,
                      std::uint64_t offset) {
  check_width(width);
  const auto unit = static_cast<std::uint64_t>(width);
  if (offset % unit != 0) {
    throw std::invalid_argument("the header offset must be a multiple of the width");
  }
  MappedFile file(path);
  if (offset > file.size() || n_tokens > (file.size() - offset) / unit) {
    throw IntegrityError("shard " + path,
                         std::to_string(file.size()) + " bytes, too few for " +
                             std::to_string(n_tokens) + " tokens of " + std::to_string(width) +
                             " bytes after a header of " + std::to_string(offset),
                         "the file changed while it was being opened: start again");
  }
  const std::byte* tokens = file.data() ? file.data() + offset : nullptr;
  files_.push_back(std::move(file));
  add({tokens, n_tokens, width});
}

void Corpus::add_memory(const std::byte* tokens, int width, std::uint64_t n_tokens) {
  check_width(width);
  if (reinterpret_cast<std::uintptr_t>(tokens) % static_cast<std::uintptr_t>(width) != 0) {
    throw std::invalid_argument("the tokens are not aligned to their width");
  }
  add({tokens, n_tokens, width});
}

void Corpus::add(const Span& shard) {
  const std::uint64_t before = n_tokens();
  if (shard.n_tokens > kMaxTokens - before) {
    throw std::overflow_error("a corpus holds fewer than 2^63 tokens");
  }
  shards_.push_back(shard);
  ends_.push_back(before + shard.n_tokens);
}

}  // namespace mypt::data
