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

// Which bytes of a message are covered: a prefix, and islands behind gaps, merged where they touch.
class ByteRanges {
 public:
  // Adds [begin, begin + num_bytes); false, and nothing is added, if a part of it is there already.
  bool add(std::size_t begin, std::size_t num_bytes) {
    if (num_bytes == 0) return true;
    if (begin < prefix_bytes_) return false;
    const std::size_t end = begin + num_bytes;
    const auto next = islands_.lower_bound(begin);
    if (next != islands_.end() && next->first < end) return false;
    const auto before = next == islands_.begin() ? islands_.end() : std::prev(next);
    if (before != islands_.end() && before->second > begin) return false;
    if (begin == prefix_bytes_) {
      prefix_bytes_ = end;
      if (next != islands_.end() && next->first == end) {
        prefix_bytes_ = next->second;
        islands_.erase(next);
      }
      return true;
    }
    auto place = before != islands_.end() && before->second == begin ? before : islands_.end();
    if (place == islands_.end()) place = islands_.emplace_hint(next, begin, end);
    else place->second = end;
    if (next != islands_.end() && next->first == end) {
      place->second = next->second;
      islands_.erase(next);
    }
    return true;
  }

  // Covered without a gap from the beginning.
  std::size_t prefix_bytes() const { return prefix_bytes_; }

 private:
  std::size_t prefix_bytes_ = 0;                // in the common case all there is
  std::map<std::size_t, std::size_t> islands_;  // begin → end
};

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
  ByteRanges arrived{};
  // What the slices that have begun cover, on all links. Two that cover the same byte would make the message
  // complete while one of them still writes into it.
  ByteRanges promised{};

  bool is_complete() const { return arrived_bytes == total_bytes; }
  std::byte* memory() const { return receive ? receive->data : stash.get(); }

  void note_arrival(std::size_t offset, std::size_t num_bytes) {
    arrived_bytes += num_bytes;
    arrived.add(offset, num_bytes);
    if (receive) receive->moved_bytes = arrived.prefix_bytes();
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
