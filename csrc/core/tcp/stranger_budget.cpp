#include "core/tcp/stranger_budget.h"

#include <algorithm>
#include <cstdio>

namespace paceline {

bool StrangerBudget::may_accept(Nanoseconds now) {
  if (filled_at_ != 0) {
    const double seconds = static_cast<double>(now - filled_at_) / static_cast<double>(second_ns);
    left_ = std::min(burst, left_ + seconds * per_second);
  }
  filled_at_ = now;
  return left_ >= 1.0;
}

void StrangerBudget::report(int rank, const std::string& source, const std::string& why, Nanoseconds now) {
  const bool is_known = reports_.contains(source) || reports_.size() < max_sources;
  const std::string& name = is_known ? source : "many addresses";
  const auto [found, is_new] = reports_.try_emplace(name, Report{now, 0});
  Report& last = found->second;
  if (!is_new && now - last.at < 60 * second_ns) {
    ++last.num_unsaid;
    return;
  }
  const std::string more =
      last.num_unsaid ? " (" + std::to_string(last.num_unsaid) + " more since the last such line)" : "";
  last = {now, 0};
  std::fprintf(stderr, "paceline: rank %d, TCP: refused a connection from %s: %s%s\n", rank, name.c_str(),
               why.c_str(), more.c_str());
}

}  // namespace paceline
