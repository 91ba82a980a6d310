// The ways data can be unusable; bindings.cpp turns them into mypt_fast.errors.
#pragma once

#include <stdexcept>
#include <string>

namespace mypt::data {

// what: what was asked, found: what was there instead, cure: what the user can do.
class Error : public std::runtime_error {
 public:
  Error(std::string what, std::string found, std::string cure)
      : std::runtime_error(what + "; " + found),
        what_part(std::move(what)),
        found_part(std::move(found)),
        cure_part(std::move(cure)) {}

  std::string what_part, found_part, cure_part;
};

class DataError : public Error {
  using Error::Error;
};

class IntegrityError : public Error {
  using Error::Error;
};

// A file that is not what it was when it was validated.
class DataChangedError : public IntegrityError {
  using IntegrityError::IntegrityError;
};

}  // namespace mypt::data
