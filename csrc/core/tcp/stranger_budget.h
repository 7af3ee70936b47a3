// What connections from strangers may cost a rank: a bounded number a second, and one line of text a minute.
#pragma once
#include <map>
#include <string>

#include "core/base/sync.h"

namespace paceline {

class StrangerBudget {
 public:
  // Whether one more connection may be accepted now.
  bool may_accept(Nanoseconds now);
  // A connection was accepted.
  void spend() { left_ -= 1.0; }
  // Says on standard error that a connection from `source` was refused: once a minute for each source.
  void report(int rank, const std::string& source, const std::string& why, Nanoseconds now);

 private:
  static constexpr double per_second = 400.0, burst = 256.0;
  static constexpr std::size_t max_sources = 64;
  struct Report {
    Nanoseconds at;
    std::uint64_t num_unsaid;
  };

  double left_ = burst;
  Nanoseconds filled_at_ = 0;
  std::map<std::string, Report> reports_;  // by source
};

}  // namespace paceline
