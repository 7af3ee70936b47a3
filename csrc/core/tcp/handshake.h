// Mutual challenge and response over a new connection, before any of its bytes is interpreted.
//
//   acceptor → dialer   challenge   32 random bytes
//   dialer → acceptor   claim       32 random bytes, dialer's rank, acceptor's rank, link number, 0
//                       proof       HMAC(key, "dialer"   ‖ challenge ‖ claim)
//   acceptor → dialer   proof       HMAC(key, "acceptor" ‖ challenge ‖ claim)
//
// Both sides contribute fresh bytes, so nothing can be replayed; the labels keep a proof from being
// reflected; both ranks and the link's number are under the MAC, so a proof is valid for one link only.
#pragma once
#include <array>
#include <cstdint>
#include <span>

#include "core/base/sha256.h"

namespace paceline {

// The key of one job's links. The secret itself authenticates nothing, and `session` separates jobs or
// restarts that share a secret.
Digest link_key(std::span<const std::byte> secret, std::span<const std::byte> session);

class Handshake {
 public:
  enum class State : std::uint8_t { talking, done, refused };

  static Handshake dialer(const Digest& key, int own_rank, int peer_rank, int link);
  static Handshake acceptor(const Digest& key, int own_rank);

  // The bytes to write now, in order; `sent` tells how many of them were written.
  std::span<const std::byte> outgoing() const;
  void sent(std::size_t num_bytes) { out_begin_ += num_bytes; }
  // Where to read the next bytes to: never more than the current message; empty while none is expected.
  std::span<std::byte> wanted();
  void received(std::size_t num_bytes);

  State state() const { return state_; }
  // Valid once done (for the acceptor: proven by the peer).
  int peer() const { return peer_; }
  int link() const { return link_; }

 private:
  static constexpr std::size_t nonce_bytes = 32, claim_bytes = nonce_bytes + 16, proof_bytes = 32;

  Handshake(const Digest& key, int own_rank, bool is_dialer);
  void dialer_step();
  void acceptor_step();
  Digest proof(const char* role) const;
  void send(std::span<const std::byte> bytes);

  Digest key_;
  int own_rank_, peer_ = -1, link_ = 0;
  bool is_dialer_, has_answered_ = false;
  State state_ = State::talking;
  std::array<std::byte, nonce_bytes> challenge_{};
  std::array<std::byte, claim_bytes> claim_{};
  std::array<std::byte, claim_bytes + proof_bytes> in_{};
  std::size_t in_size_ = 0, in_wanted_ = 0;
  std::array<std::byte, claim_bytes + proof_bytes> out_{};
  std::size_t out_begin_ = 0, out_end_ = 0;
};

}  // namespace paceline
