// Special values of ranks.
#pragma once

namespace paceline {

inline constexpr int any_rank = -1;  // a receive takes the first message that fits, from any sender

}  // namespace paceline
