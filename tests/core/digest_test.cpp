// SHA-256 and HMAC against published vectors (FIPS 180-4 examples, RFC 4231), and addresses.
#include "check.h"
#include "core/base/sha256.h"
#include "core/tcp/socket.h"

using namespace paceline;

static std::span<const std::byte> raw(const std::string& s) {
  return std::as_bytes(std::span(s.data(), s.size()));
}

static std::string hex(const Digest& d) {
  std::string text;
  for (const auto b : d) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", std::to_integer<unsigned>(b));
    text += two;
  }
  return text;
}

CASE(sha256_vectors) {
  CHECK(hex(sha256(raw(""))) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(hex(sha256(raw("abc"))) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(hex(sha256(raw("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"))) ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(hex(sha256(raw(std::string(1000000, 'a')))) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  for (std::size_t n = 0; n < 200; ++n) {  // pieces of any size give the same as the whole
    const std::string text(n, 'x');
    Sha256 pieces;
    for (std::size_t i = 0; i < n; i += 7) pieces.update(raw(text.substr(i, 7)));
    CHECK(pieces.finish() == sha256(raw(text)));
  }
}

CASE(hmac_vectors) {
  CHECK(hex(hmac_sha256(raw("Jefe"), raw("what do ya want for nothing?"))) ==
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  CHECK(hex(hmac_sha256(raw(std::string(20, '\x0b')), raw("Hi There"))) ==
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  CHECK(hex(hmac_sha256(raw(std::string(131, '\xaa')),
                        raw("Test Using Larger Than Block-Size Key - Hash Key First"))) ==
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

CASE(equality) {
  Digest a = sha256(raw("a")), b = a;
  CHECK(equal_in_constant_time(a, b));
  b[31] ^= std::byte{1};
  CHECK(!equal_in_constant_time(a, b));
}

CASE(addresses) {
  for (const char* text : {"10.0.0.1:4000", "[fd00::1]:4001", "127.0.0.1:0"})
    CHECK(Endpoint::parse(text).text() == text);
  CHECK(Endpoint::parse("fd00::1").text() == "[fd00::1]:0");
  CHECK(Endpoint::parse("10.0.0.1").port() == 0);
  for (const char* text : {"", "example.com", "10.0.0.1:x", "[fd00::1", "1.2.3.4.5"}) {
    bool is_refused = false;
    try {
      (void)Endpoint::parse(text);
    } catch (const std::invalid_argument&) {
      is_refused = true;
    }
    CHECK(is_refused);
  }
  CHECK(addresses_of("lo").front().is_loopback());
  CHECK(addresses_of("127.0.0.1").size() == 1 && addresses_of("").empty());
  bool is_refused = false;
  try {
    (void)addresses_of("nosuch0");
  } catch (const std::invalid_argument& error) {
    is_refused = std::string(error.what()).find("lo 127.0.0.1") != std::string::npos;
  }
  CHECK(is_refused);
  CHECK(address_towards(Endpoint::parse("127.0.0.1")).is_loopback());
}

int main(int argc, char** argv) { return run_cases(argc, argv); }
