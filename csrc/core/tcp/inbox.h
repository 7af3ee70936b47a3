// Matches messages that arrive with receives that were posted: first come, first served for each (peer, tag).
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "core/engine/transport.h"

namespace paceline {

// A message of which something has arrived, if only its announcement.
struct Incoming {
  int peer;
  std::uint64_t sequence;
  Tag tag;
  std::size_t total_bytes;
  bool is_announced;  // it waits to be accepted; otherwise it came unasked and holds credit
  std::size_t arrived_bytes = 0;
  Transfer* receive = nullptr;  // once matched
  bool is_discarded = false;
  std::unique_ptr<std::byte[]> stash{};          // holds slices until it is matched
  std::map<std::size_t, std::size_t> islands{};  // begin → end of what arrived behind a gap
  std::size_t prefix_bytes = 0;                  // arrived without a gap

  bool is_complete() const { return arrived_bytes == total_bytes; }
  std::byte* memory() const { return receive ? receive->data : stash.get(); }

  void note_arrival(std::size_t offset, std::size_t num_bytes) {
    arrived_bytes += num_bytes;
    if (offset == prefix_bytes) {
      prefix_bytes += num_bytes;
      for (auto it = islands.begin(); it != islands.end() && it->first <= prefix_bytes;
           it = islands.erase(it))
        prefix_bytes = std::max(prefix_bytes, it->second);
    } else {
      const auto before = islands.upper_bound(offset);
      if (before != islands.begin() && std::prev(before)->second == offset)
        std::prev(before)->second += num_bytes;
      else islands[offset] = offset + num_bytes;
    }
    if (receive) receive->moved_bytes = prefix_bytes;
  }
};

// The two sides of the matching: receives without a message, and messages without a receive.
class Inbox {
 public:
  void add(Transfer& receive) { receives_[receive.tag].push_back(&receive); }
  void add(Incoming& message) { messages_[message.tag].push_back(&message); }

  Transfer* take_receive(int peer, Tag tag) {
    return take(receives_, tag, [&](Transfer* t) { return t->peer == peer || t->peer == any_rank; });
  }
  Incoming* take_message(int peer, Tag tag) {
    return take(messages_, tag, [&](Incoming* m) { return m->peer == peer || peer == any_rank; });
  }
  bool remove(const Transfer& receive) {
    return take(receives_, receive.tag, [&](const Transfer* t) { return t == &receive; }) != nullptr;
  }
  void remove(Incoming& message) {
    take(messages_, message.tag, [&](Incoming* m) { return m == &message; });
  }
  // Takes out every receive that `wanted` selects.
  template <class Predicate>
  std::vector<Transfer*> take_receives_if(Predicate wanted) {
    std::vector<Transfer*> taken;
    for (auto it = receives_.begin(); it != receives_.end();) {
      std::erase_if(it->second, [&](Transfer* t) { return wanted(*t) ? (taken.push_back(t), true) : false; });
      it = it->second.empty() ? receives_.erase(it) : std::next(it);
    }
    return taken;
  }

 private:
  template <class T>
  using Queues = std::unordered_map<Tag, std::vector<T*>>;

  template <class T, class Predicate>
  static T* take(Queues<T>& queues, Tag tag, Predicate fits) {
    const auto queue = queues.find(tag);
    if (queue == queues.end()) return nullptr;
    const auto found = std::ranges::find_if(queue->second, fits);
    if (found == queue->second.end()) return nullptr;
    T* const item = *found;
    queue->second.erase(found);
    if (queue->second.empty()) queues.erase(queue);
    return item;
  }

  Queues<Transfer> receives_;
  Queues<Incoming> messages_;
};

}  // namespace paceline
