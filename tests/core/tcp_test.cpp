// The TCP transport: delivery, order, credit, failure, strangers.
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <deque>
#include <random>

#include "mesh.h"

using namespace paceline;
using State = Transfer::State;

CASE(sizes_and_links) {
  for (const int links : {1, 3}) {
    for (const bool checks : {false, true}) {
      TcpOptions options;
      options.links_per_peer = links, options.checks = checks;
      Mesh mesh(2, options);
      Tag tag = 0;
      for (const std::size_t n :
           {0ul, 1ul, 55ul, 65480ul, 65536ul, 262144ul, 262145ul, 5000001ul, 20000000ul}) {
        for (const bool is_late : {false, true}) {
          Message out(1, ++tag, n, 7), in(0, tag, n);
          if (!is_late) mesh[1].post_receive(in);
          mesh[0].post_send(out);
          if (is_late) mesh.drive([] { return false; }, 0.02);
          if (is_late) mesh[1].post_receive(in);
          CHECK(mesh.drive([&] { return out.is_over() && in.is_over(); }));
          CHECK(out.state == State::done && in.state == State::done && in.holds(7) && in.moved_bytes == n);
        }
      }
    }
  }
}

CASE(order_of_one_tag_over_many_links) {
  TcpOptions options;
  options.links_per_peer = 4;
  Mesh mesh(2, options);
  std::mt19937 random(5);
  std::deque<Message> out, in;
  for (int i = 0; i < 400; ++i) {
    const std::size_t n = random() % 3 ? random() % 900 : random() % 600000;
    out.emplace_back(1, 9, n, i);
    in.emplace_back(0, 9, n);
  }
  // Everything is far more than the credit, so some messages are announced and some come unasked.
  for (auto& m : out) mesh[0].post_send(m);
  for (auto& m : in) mesh[1].post_receive(m);
  CHECK(mesh.drive([&] { return std::ranges::all_of(in, [](auto& m) { return m.is_over(); }); }));
  for (int i = 0; i < 400; ++i) CHECK(in[static_cast<std::size_t>(i)].holds(i));
}

CASE(stashes_are_bounded) {
  Mesh mesh(2);
  std::deque<Message> out, in;
  for (int i = 0; i < 100; ++i) out.emplace_back(1, i, 1 << 20, i);
  for (auto& m : out) mesh[0].post_send(m);
  mesh.drive([] { return false; }, 0.3);
  CHECK(std::ranges::count_if(out, [](auto& m) { return m.state == State::done; }) == 8);
  for (int i = 99; i >= 0; --i) {  // in any order
    in.emplace_back(0, i, 1 << 20);
    mesh[1].post_receive(in.back());
    CHECK(mesh.drive([&] { return in.back().is_over(); }) && in.back().holds(i));
  }
  CHECK(mesh.drive([&] { return std::ranges::all_of(out, [](auto& m) { return m.is_over(); }); }));
}

CASE(urgent_messages_overtake) {
  Mesh mesh(2);
  Message big(1, 1, 300 << 20, 1), urgent(1, 2, 64, 2, 9), big_in(0, 1, 300 << 20), urgent_in(0, 2, 64);
  mesh[1].post_receive(big_in);
  mesh[1].post_receive(urgent_in);
  mesh[0].post_send(big);
  CHECK(mesh.drive([&] { return big_in.moved_bytes > (10 << 20); }));
  mesh[0].post_send(urgent);
  CHECK(mesh.drive([&] { return urgent_in.is_over(); }));
  CHECK(!big_in.is_over() && urgent_in.holds(2));
  CHECK(mesh.drive([&] { return big_in.is_over() && big.is_over(); }) && big_in.holds(1));
}

CASE(any_source_and_wrong_length) {
  Mesh mesh(3);
  Message a(0, 4, 8, 1), b(0, 4, 8, 2), in1(any_rank, 4, 8), in2(any_rank, 4, 8);
  mesh[0].post_receive(in1);
  mesh[1].post_send(a);
  CHECK(mesh.drive([&] { return in1.is_over(); }) && in1.peer == 1 && in1.holds(1));
  mesh[2].post_send(b);
  mesh.drive([] { return false; }, 0.05);
  mesh[0].post_receive(in2);
  CHECK(in2.state == State::done && in2.peer == 2 && in2.holds(2));
  for (const std::size_t n : {8ul, 9000000ul}) {
    Message wrong(0, 5, n, 1), right(0, 5, 16, 3), in3(1, 5, 7), in4(1, 5, 16);
    mesh[0].post_receive(in3);
    mesh[0].post_receive(in4);
    mesh[1].post_send(wrong);
    mesh[1].post_send(right);
    CHECK(mesh.drive([&] { return in3.is_over() && in4.is_over() && wrong.is_over(); }));
    CHECK(in3.state == State::failed && in3.failure.kind == FailureKind::mismatch && in3.failure.rank == 1);
    CHECK(in4.holds(3));  // the stream goes on
  }
}

CASE(a_lost_peer_fails_its_transfers_only) {
  Mesh mesh(3);
  Message warm(1, 1, 4, 1), warm_in(0, 1, 4);
  mesh[1].post_receive(warm_in);
  mesh[0].post_send(warm);
  Message last(0, 8, 100, 6), waiting(1, 2, 4), other(2, 3, 4), other_out(0, 3, 4, 5), stuck(1, 7, 64 << 20);
  CHECK(mesh.drive([&] { return warm_in.is_over(); }));
  mesh[0].post_receive(waiting);
  mesh[0].post_receive(other);
  mesh[0].post_send(stuck);
  mesh[1].post_send(last);
  mesh.drive([] { return false; }, 0.05);
  mesh.ranks[1].reset();
  CHECK(mesh.drive([&] { return waiting.is_over() && stuck.is_over(); }));
  CHECK(waiting.state == State::failed && waiting.failure.kind == FailureKind::peer_lost &&
        waiting.failure.rank == 1);
  // It said goodbye: transfers that wait for it fail, but it does not count as lost. Deaths are tested with
  // processes.
  CHECK(stuck.state == State::failed && !mesh[0].is_lost(1) && !mesh[0].is_lost(2));
  Message late(1, 9, 4), last_in(1, 8, 100);
  mesh[0].post_receive(late);
  CHECK(late.state == State::failed);
  mesh[0].post_receive(last_in);  // it did arrive before
  CHECK(last_in.state == State::done && last_in.holds(6));
  mesh[2].post_send(other_out);
  CHECK(mesh.drive([&] { return other.is_over(); }) && other.holds(5));
}

CASE(nobody_there) {
  TcpOptions options;
  options.connect_timeout = 300 * millisecond_ns;
  Mesh mesh(2, options);
  mesh.ranks[1].reset();
  Message out(1, 1, 4, 1), in(1, 2, 4);
  mesh[0].post_receive(in);
  mesh[0].post_send(out);
  CHECK(mesh.drive([&] { return out.is_over() && in.is_over(); }, 5));
  CHECK(out.failure.kind == FailureKind::peer_lost && out.failure.rank == 1);
  CHECK(out.failure.detail.find("refused") != std::string::npos);
}

CASE(wrong_secrets_are_refused) {
  TcpOptions options;
  options.rank = 0, options.size = 2, options.connect_timeout = 500 * millisecond_ns;
  options.secret = bytes_of("ours");
  auto ours = std::make_unique<TcpTransport>(options);
  options.rank = 1, options.secret = bytes_of("theirs");
  auto theirs = std::make_unique<TcpTransport>(options);
  Mesh mesh(0);
  const std::vector<std::string> endpoints{ours->endpoints(), theirs->endpoints()};
  ours->set_peers(endpoints);
  theirs->set_peers(endpoints);
  mesh.ranks.push_back(std::move(ours));
  mesh.ranks.push_back(std::move(theirs));
  Message a(1, 1, 4, 1), b(0, 1, 4, 1);
  mesh[0].post_send(a);
  mesh[1].post_send(b);
  CHECK(mesh.drive([&] { return a.is_over() && b.is_over(); }, 5));
  CHECK(a.state == State::failed && b.state == State::failed);
  CHECK(mesh[0].num_links(1) == 0 && mesh[1].num_links(0) == 0);
}

CASE(proofs_bind_ranks_and_roles) {
  const Digest key = link_key(bytes_of("k"), {});
  const auto feed = [](Handshake& to, std::span<const std::byte> data) {
    std::ranges::copy(data, to.wanted().begin());
    to.received(data.size());
  };
  const auto talk = [&](Handshake& d, Handshake& a) {
    feed(d, a.outgoing());
    a.sent(a.outgoing().size());
    feed(a, d.outgoing());
    if (a.state() == Handshake::State::done) feed(d, a.outgoing());
  };
  auto d = Handshake::dialer(key, 1, 2, 5), a = Handshake::acceptor(key, 2);
  talk(d, a);
  CHECK(d.state() == Handshake::State::done && a.state() == Handshake::State::done);
  CHECK(a.peer() == 1 && a.link() == 5);
  auto d2 = Handshake::dialer(key, 1, 2, 5), elsewhere = Handshake::acceptor(key, 3);  // meant for rank 2
  talk(d2, elsewhere);
  CHECK(elsewhere.state() == Handshake::State::refused);
  // A claim recorded from one conversation is worthless in the next: the challenge differs.
  auto d3 = Handshake::dialer(key, 1, 2, 0), a3 = Handshake::acceptor(key, 2),
       a4 = Handshake::acceptor(key, 2);
  feed(d3, a3.outgoing());
  feed(a4, d3.outgoing());
  CHECK(a4.state() == Handshake::State::refused);
  // Reflection: a dialer's own proof does not pass for the acceptor's.
  auto d5 = Handshake::dialer(key, 1, 2, 0), a5 = Handshake::acceptor(key, 2);
  feed(d5, a5.outgoing());
  const std::vector<std::byte> own(d5.outgoing().end() - 32, d5.outgoing().end());
  feed(d5, own);
  CHECK(d5.state() == Handshake::State::refused);
}

static Fd stranger(const std::string& endpoint) {
  Fd fd = dial(Endpoint::parse(endpoint), nullptr);
  return fd;
}

CASE(strangers_disturb_nothing) {
  Mesh mesh(2);
  std::mt19937 random(3);
  std::deque<Fd> open;
  for (int i = 0; i < 1000; ++i) {
    open.push_back(stranger(mesh[i % 2].endpoints()));
    std::vector<std::uint8_t> noise(random() % 300);
    for (auto& b : noise) b = static_cast<std::uint8_t>(random());
    mesh[0].progress(), mesh[1].progress();
    (void)!::send(open.back().get(), noise.data(), noise.size(), MSG_NOSIGNAL);
    if (open.size() > 200) open.pop_front();
    if (i % 100 == 50) {  // real traffic goes on meanwhile
      Message out(1, i, 5000, i), in(0, i, 5000);
      mesh[1].post_receive(in);
      mesh[0].post_send(out);
      CHECK(mesh.drive([&] { return in.is_over() && out.is_over(); }) && in.holds(i));
    }
    CHECK(mesh[0].num_guests() <= 130 && mesh[1].num_guests() <= 130);
  }
  open.clear();
  CHECK(mesh.drive([&] { return mesh[0].num_guests() == 0 && mesh[1].num_guests() == 0; }));
  CHECK(mesh[0].num_links(1) == 1);
}

// A peer that knows the secret and does not keep to the protocol: links of its own, frame by frame.
struct BrokenPeer {
  Mesh& mesh;
  std::deque<Fd> links{};

  void write(std::size_t link, const void* bytes, std::size_t n) {
    for (std::size_t done = 0; done < n;) {
      const auto sent = ::send(links[link].get(), static_cast<const char*>(bytes) + done, n - done, MSG_NOSIGNAL);
      if (sent > 0) done += static_cast<std::size_t>(sent);
      mesh[1].progress();
    }
  }
  void connect() {
    Fd& socket = links.emplace_back(dial(Endpoint::parse(mesh[1].endpoints()), nullptr));
    auto handshake = Handshake::dialer(link_key(bytes_of("secret"), {}), 0, 1, static_cast<int>(links.size()));
    while (handshake.state() == Handshake::State::talking) {
      mesh[1].progress();
      if (const auto out = handshake.outgoing(); !out.empty()) {
        write(links.size() - 1, out.data(), out.size());
        handshake.sent(out.size());
      }
      if (const auto in = handshake.wanted(); !in.empty())
        if (const auto n = ::recv(socket.get(), in.data(), in.size(), MSG_DONTWAIT); n > 0)
          handshake.received(static_cast<std::size_t>(n));
    }
    CHECK(handshake.state() == Handshake::State::done);
  }
  void begin_slice(std::size_t link, std::uint64_t total, std::uint64_t offset, std::uint32_t n) {
    LinkFrameHeader header;
    header.tag = 7, header.total_bytes = total, header.offset = offset, header.num_bytes = n;
    write(link, &header, sizeof header);
  }
};

CASE(slices_that_overlap_end_the_peer) {
  const std::vector<std::byte> bytes(100);
  for (const bool is_matched : {false, true}) {
    for (const auto& [offset, n] : {std::pair{40u, 60u}, {0u, 60u}, {0u, 100u}, {59u, 1u}}) {
      Mesh mesh(2);
      BrokenPeer peer{mesh};
      peer.connect();
      peer.connect();
      Message in(0, 7, 100);
      if (is_matched) mesh[1].post_receive(in);
      peer.begin_slice(0, 100, 0, 60);
      peer.write(0, bytes.data(), 30);  // the first slice is still arriving
      peer.begin_slice(1, 100, offset, n);
      peer.write(1, bytes.data(), n);
      CHECK(mesh.drive([&] { return mesh[1].num_links(0) == 0; }, 5));
      if (is_matched) CHECK(in.state == State::failed);
    }
  }
}

CASE(slices_that_do_not_overlap_come_in_any_order) {
  const std::vector<std::byte> bytes(100, std::byte{5});
  Mesh mesh(2);
  BrokenPeer peer{mesh};
  peer.connect();
  peer.connect();
  Message in(0, 7, 100);
  mesh[1].post_receive(in);
  for (const auto& [offset, n] : {std::pair{60u, 40u}, {0u, 20u}, {40u, 20u}, {20u, 20u}}) {
    peer.begin_slice(offset % 40 ? 1 : 0, 100, offset, n);
    peer.write(offset % 40 ? 1 : 0, bytes.data(), n);
  }
  CHECK(mesh.drive([&] { return in.is_over(); }, 5) && in.state == State::done && in.memory == bytes);
}

CASE(a_flood_costs_a_bounded_number_of_handshakes) {
  Mesh mesh(2);
  std::deque<Fd> open;
  for (int i = 0; i < 900; ++i) open.push_back(stranger(mesh[0].endpoints()));
  int num_accepted = 0;
  const auto end = now_ns() + second_ns / 5;
  while (now_ns() < end) {
    mesh[0].progress();
    num_accepted = std::max(num_accepted, mesh[0].num_guests());
  }
  std::size_t num_greeted = 0;
  for (const Fd& fd : open) {
    std::byte challenge[32];
    num_greeted += ::recv(fd.get(), challenge, sizeof challenge, MSG_DONTWAIT) > 0;
  }
  CHECK(num_greeted < 500 && num_greeted > 100);
  Message out(1, 1, 50, 3), in(0, 1, 50);  // and a rank still gets in
  mesh[1].post_receive(in);
  mesh[0].post_send(out);
  CHECK(mesh.drive([&] { return in.is_over() && out.is_over(); }) && in.holds(3));
}

CASE(without_free_descriptors_a_stranger_does_not_make_a_rank_spin) {
  Mesh mesh(2);
  std::deque<Fd> open;
  for (int i = 0; i < 3; ++i) open.push_back(stranger(mesh[0].endpoints()));
  rlimit before;
  ::getrlimit(RLIMIT_NOFILE, &before);
  const rlimit none{static_cast<rlim_t>(open.back().get() + 1), before.rlim_max};
  ::setrlimit(RLIMIT_NOFILE, &none);
  int num_busy = 0;
  const auto end = now_ns() + second_ns / 5;
  while (now_ns() < end) num_busy += mesh[0].progress();
  CHECK(num_busy < 50);
  ::setrlimit(RLIMIT_NOFILE, &before);
  CHECK(mesh.drive([&] { return mesh[0].num_guests() == 3; }, 5));
}

CASE(cancelled_receives_lose_their_place) {
  Mesh mesh(2);
  Message first(0, 1, 8), second(0, 1, 8), out(1, 1, 8, 4);
  mesh[1].post_receive(first);
  mesh[1].post_receive(second);
  mesh[1].cancel(first);
  mesh[0].post_send(out);
  CHECK(mesh.drive([&] { return second.is_over(); }) && second.holds(4));
  Message big(1, 2, 30 << 20, 1), big_in(0, 2, 30 << 20), after(1, 3, 8, 2), after_in(0, 3, 8);
  mesh[1].post_receive(big_in);
  mesh[0].post_send(big);
  mesh[0].post_send(after);
  CHECK(mesh.drive([&] { return big_in.moved_bytes > 1000000; }));
  mesh[1].cancel(big_in);
  std::ranges::fill(big_in.memory, std::byte{0});
  mesh[1].post_receive(after_in);
  CHECK(mesh.drive([&] { return big.is_over() && after_in.is_over(); }) && after_in.holds(2));
  CHECK(std::ranges::all_of(big_in.memory, [](auto b) { return b == std::byte{0}; }));
}

CASE(ranks_as_threads) {
  constexpr int size = 4, rounds = 60;
  TcpOptions options;
  options.links_per_peer = 2;
  Mesh mesh(size, options);
  std::barrier together(size);
  run_ranks(size, [&](int rank) {
    TcpTransport& mine = mesh[rank];
    std::mt19937 random(11);  // the same sizes everywhere
    for (int round = 0; round < rounds; ++round) {
      const std::size_t n = random() % 4 ? random() % 3000 : random() % 700000;
      std::deque<Message> out, in;
      for (int p = 0; p < size; ++p) {
        if (p == rank) continue;
        in.emplace_back(p, round, n);
        mine.post_receive(in.back());
        out.emplace_back(p, round, n, rank + round);
        mine.post_send(out.back());
      }
      const auto over = [](auto& m) { return m.is_over(); };
      while (!std::ranges::all_of(in, over) || !std::ranges::all_of(out, over)) {
        pollfd waiting{mine.event_fd(), POLLIN, 0};
        if (!mine.progress()) ::poll(&waiting, 1, 1000);  // events must wake a sleeper
      }
      for (auto& m : in) CHECK(m.state == State::done && m.holds(m.peer + round));
    }
    together.arrive_and_wait();
  });
}

int main(int argc, char** argv) { return run_cases(argc, argv); }
