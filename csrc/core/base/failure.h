// Why an operation failed; the bindings turn it into the exception of the same name in paceline.errors.
#pragma once
#include <cstdint>
#include <exception>
#include <string>
#include <utility>

namespace paceline {

enum class FailureKind : std::uint8_t { none, peer_lost, timeout, mismatch, protocol, config, aborted };

struct Failure {
  FailureKind kind = FailureKind::none;
  int rank = -1;       // the culprit, in the numbering of the group that holds this Failure; -1: none
  std::string detail;  // one sentence: what was expected, what was got

  explicit operator bool() const { return kind != FailureKind::none; }
};

// A Failure on its way up inside the core.
class Failed : public std::exception {
 public:
  explicit Failed(Failure failure) : failure(std::move(failure)) {}
  const char* what() const noexcept override { return failure.detail.c_str(); }
  Failure failure;
};

}  // namespace paceline
