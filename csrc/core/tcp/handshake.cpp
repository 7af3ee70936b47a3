#include "core/tcp/handshake.h"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <system_error>
#include <vector>

namespace paceline {
namespace {

void fill_randomly(std::span<std::byte> out) {
  if (::getrandom(out.data(), out.size(), 0) != static_cast<ssize_t>(out.size()))
    throw std::system_error(errno, std::generic_category(), "getrandom");
}

void append(std::vector<std::byte>& out, std::span<const std::byte> bytes) {
  out.insert(out.end(), bytes.begin(), bytes.end());
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

void put(std::byte* at, std::uint32_t value) {
  for (int i = 0; i < 4; ++i) at[i] = static_cast<std::byte>(value >> (8 * i));
}

std::uint32_t get(const std::byte* at) {
  std::uint32_t value = 0;
  for (int i = 0; i < 4; ++i) value |= std::to_integer<std::uint32_t>(at[i]) << (8 * i);
  return value;
}

}  // namespace

Digest link_key(std::span<const std::byte> secret, std::span<const std::byte> session) {
  std::vector<std::byte> text;
  append(text, bytes_of("paceline tcp link, version 1"));
  append(text, session);
  return hmac_sha256(secret, text);
}

Handshake::Handshake(const Digest& key, int own_rank, bool is_dialer)
    : key_(key), own_rank_(own_rank), is_dialer_(is_dialer) {}

Handshake Handshake::dialer(const Digest& key, int own_rank, int peer_rank, int link) {
  Handshake h(key, own_rank, true);
  h.peer_ = peer_rank;
  h.link_ = link;
  h.in_wanted_ = nonce_bytes;
  return h;
}

Handshake Handshake::acceptor(const Digest& key, int own_rank) {
  Handshake h(key, own_rank, false);
  fill_randomly(h.challenge_);
  h.send(h.challenge_);
  h.in_wanted_ = claim_bytes + proof_bytes;
  return h;
}

std::span<const std::byte> Handshake::outgoing() const {
  return std::span(out_).subspan(out_begin_, out_end_ - out_begin_);
}

std::span<std::byte> Handshake::wanted() {
  if (state_ != State::talking) return {};
  return std::span(in_).subspan(in_size_, in_wanted_ - in_size_);
}

void Handshake::received(std::size_t num_bytes) {
  in_size_ += num_bytes;
  if (in_size_ < in_wanted_) return;
  if (is_dialer_) dialer_step();
  else acceptor_step();
  in_size_ = 0;
}

void Handshake::dialer_step() {
  if (!has_answered_) {
    std::copy_n(in_.begin(), nonce_bytes, challenge_.begin());
    fill_randomly(std::span(claim_).first(nonce_bytes));
    put(&claim_[nonce_bytes], static_cast<std::uint32_t>(own_rank_));
    put(&claim_[nonce_bytes + 4], static_cast<std::uint32_t>(peer_));
    put(&claim_[nonce_bytes + 8], static_cast<std::uint32_t>(link_));
    send(claim_);
    send(proof("dialer"));
    has_answered_ = true;
    in_wanted_ = proof_bytes;
    return;
  }
  Digest answer;
  std::copy_n(in_.begin(), proof_bytes, answer.begin());
  state_ = equal_in_constant_time(answer, proof("acceptor")) ? State::done : State::refused;
}

void Handshake::acceptor_step() {
  std::copy_n(in_.begin(), claim_bytes, claim_.begin());
  Digest answer;
  std::copy_n(in_.begin() + claim_bytes, proof_bytes, answer.begin());
  if (!equal_in_constant_time(answer, proof("dialer"))) {
    state_ = State::refused;
    return;
  }
  // The proof is right: from here on the bytes are those of a rank of this job.
  peer_ = static_cast<int>(get(&claim_[nonce_bytes]));
  link_ = static_cast<int>(get(&claim_[nonce_bytes + 8]));
  const bool is_for_us = get(&claim_[nonce_bytes + 4]) == static_cast<std::uint32_t>(own_rank_);
  if (!is_for_us || peer_ == own_rank_) {
    state_ = State::refused;
    return;
  }
  send(proof("acceptor"));
  state_ = State::done;
}

Digest Handshake::proof(const char* role) const {
  std::vector<std::byte> text;
  append(text, bytes_of(role));
  append(text, challenge_);
  append(text, claim_);
  return hmac_sha256(key_, text);
}

void Handshake::send(std::span<const std::byte> bytes) {
  if (out_begin_ == out_end_) out_begin_ = out_end_ = 0;
  std::ranges::copy(bytes, out_.begin() + static_cast<std::ptrdiff_t>(out_end_));
  out_end_ += bytes.size();
}

}  // namespace paceline
