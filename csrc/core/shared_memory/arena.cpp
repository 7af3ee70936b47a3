#include "core/shared_memory/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <string>

#include "core/base/failure.h"

namespace paceline {
namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t min_segment_bytes = std::size_t{64} << 20;  // address space; pages come when touched

std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

Failed failed(const std::string& what) {
  return Failed({FailureKind::config, -1, what + ": " + std::strerror(errno)});
}

std::byte* map(int fd, std::size_t num_bytes) {
  void* p = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return p == MAP_FAILED ? nullptr : static_cast<std::byte*>(p);
}

}  // namespace

Segment::Segment(std::size_t num_bytes) : num_bytes_(num_bytes) {
  fd_ = memfd_create("paceline", MFD_CLOEXEC);
  if (fd_ < 0 || ftruncate(fd_, static_cast<off_t>(num_bytes)) != 0 || !(base_ = map(fd_, num_bytes))) {
    const Failed error =
        failed("cannot make a shared-memory segment of " + std::to_string(num_bytes) + " bytes");
    if (fd_ >= 0) close(fd_);
    throw error;
  }
}

Segment::Segment(int pid, int fd, std::size_t num_bytes) : num_bytes_(num_bytes) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  const int opened = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (opened < 0) throw failed("cannot open the shared memory of process " + std::to_string(pid));
  struct stat info;
  if (fstat(opened, &info) != 0 || static_cast<std::size_t>(info.st_size) < num_bytes ||
      !(base_ = map(opened, num_bytes))) {
    const Failed error = failed("cannot map the shared memory of process " + std::to_string(pid));
    close(opened);
    throw error;
  }
  close(opened);
}

Segment::~Segment() {
  if (base_) munmap(base_, num_bytes_);
  if (fd_ >= 0) close(fd_);
}

Arena::Arena() : control_(round_up(sizeof(Control), page)) {
  entries_.reserve(Control::num_slots);
  new (control_.base()) Control{};
  control().magic = Control::expected_magic;
}

void* Arena::allocate(std::size_t num_bytes) {
  const std::size_t alignment = num_bytes >= page ? page : 64;
  num_bytes = std::max<std::size_t>(round_up(num_bytes, alignment), 64);
  const std::lock_guard lock(mutex_);
  for (std::uint32_t slot = 0; slot < entries_.size(); ++slot)
    if (entries_[slot].segment)
      if (void* p = take(slot, num_bytes, alignment)) return p;
  return take(add_segment(num_bytes), num_bytes, alignment);
}

std::uint32_t Arena::add_segment(std::size_t num_bytes) {
  std::size_t total = 0;
  for (const SegmentEntry& e : entries_) total += e.segment ? e.segment->num_bytes() : 0;
  // Growing with the total keeps the number of segments logarithmic.
  const std::size_t wanted = std::max({round_up(num_bytes, page), min_segment_bytes, total});
  auto entry = std::find_if(entries_.begin(), entries_.end(),
                            [](const SegmentEntry& e) { return e.segment == nullptr; });
  if (entry == entries_.end() && entries_.size() < Control::num_slots) entry = entries_.emplace(entry);
  if (entry == entries_.end())
    throw Failed(
        {FailureKind::config, -1,
         "all " + std::to_string(entries_.size()) + " shared-memory segments are in use: free some tensors"});
  entry->segment = std::make_unique<Segment>(wanted);
  entry->pieces = {{0, Piece{wanted, true, false}}};
  entry->used_bytes = 0;
  entry->generation = next_generation_++;
  const auto slot = static_cast<std::uint32_t>(entry - entries_.begin());
  Control::Slot& shown = control().slots[slot];
  shown.fd.store(entry->segment->fd());
  shown.num_bytes.store(wanted);
  shown.generation.store(entry->generation);
  return slot;
}

void* Arena::take(std::uint32_t slot, std::size_t num_bytes, std::size_t alignment) {
  SegmentEntry& entry = entries_[slot];
  for (auto it = entry.pieces.begin(); it != entry.pieces.end(); ++it) {
    auto& [offset, piece] = *it;
    const std::size_t start = round_up(offset, alignment), end = offset + piece.num_bytes;
    if (!piece.is_free || start + num_bytes > end) continue;
    const bool dirty = piece.is_dirty;
    if (start + num_bytes < end) entry.pieces[start + num_bytes] = {end - start - num_bytes, true, dirty};
    if (start > offset) {
      piece.num_bytes = start - offset;
      entry.pieces[start] = {num_bytes, false, true};
    } else {
      piece = {num_bytes, false, true};
    }
    entry.used_bytes += num_bytes;
    std::byte* p = entry.segment->base() + start;
    if (dirty) std::memset(p, 0, num_bytes);
    return p;
  }
  return nullptr;
}

void Arena::free(void* pointer) {
  const std::lock_guard lock(mutex_);
  const Location at = [&] {
    for (std::uint32_t s = 0; s < entries_.size(); ++s) {
      const SegmentEntry& e = entries_[s];
      if (e.segment && pointer >= e.segment->base() && pointer < e.segment->base() + e.segment->num_bytes())
        return Location{s, 0,
                        static_cast<std::uint64_t>(static_cast<std::byte*>(pointer) - e.segment->base())};
    }
    return Location{};
  }();
  if (!at.is_shared()) return;
  SegmentEntry& entry = entries_[at.slot];
  auto it = entry.pieces.find(at.offset);
  if (it == entry.pieces.end() || it->second.is_free) return;
  it->second.is_free = true;
  entry.used_bytes -= it->second.num_bytes;
  auto merge_next = [&](auto left) {
    auto right = std::next(left);
    if (right == entry.pieces.end() || !left->second.is_free || !right->second.is_free) return;
    left->second.num_bytes += right->second.num_bytes;
    left->second.is_dirty |= right->second.is_dirty;
    entry.pieces.erase(right);
  };
  merge_next(it);
  if (it != entry.pieces.begin()) merge_next(std::prev(it));
  if (entry.used_bytes == 0) {
    control().slots[at.slot].generation.store(0);
    entry = SegmentEntry{};
  }
}

Location Arena::locate(const void* pointer, std::size_t num_bytes) const {
  const std::lock_guard lock(mutex_);
  const auto p = reinterpret_cast<std::uintptr_t>(pointer);
  for (std::uint32_t s = 0; s < entries_.size(); ++s) {
    const SegmentEntry& e = entries_[s];
    if (!e.segment) continue;
    const auto base = reinterpret_cast<std::uintptr_t>(e.segment->base());
    if (p >= base && p + num_bytes <= base + e.segment->num_bytes()) return {s, e.generation, p - base};
  }
  return {};
}

std::byte* Arena::resolve(const Location& location) const {
  const std::lock_guard lock(mutex_);
  if (location.slot >= entries_.size()) return nullptr;
  const SegmentEntry& e = entries_[location.slot];
  return e.segment && e.generation == location.generation ? e.segment->base() + location.offset : nullptr;
}

std::size_t Arena::num_segments() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::size_t>(std::count_if(entries_.begin(), entries_.end(),
                                                [](const SegmentEntry& e) { return e.segment != nullptr; }));
}

std::size_t Arena::allocated_bytes() const {
  const std::lock_guard lock(mutex_);
  std::size_t total = 0;
  for (const SegmentEntry& e : entries_) total += e.used_bytes;
  return total;
}

}  // namespace paceline
