#include <nanobind/stl/string.h>

#include <string>

#include "bind/bind.h"
#include "core/codecs/encode.h"
#include "core/codecs/isa.h"

namespace nb = nanobind;

namespace paceline::bind {
namespace {

using namespace codec;

// Addresses travel as integers: a call costs 0.4 µs instead of several for an array object.
const float* floats(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }
float* mutable_floats(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

CodecId id_of(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(CodecId::topk); ++i) {
    if (name == name_of(static_cast<CodecId>(i))) return static_cast<CodecId>(i);
  }
  throw ArgumentError("unknown codec " + name);
}

std::size_t max_bytes(const std::string& codec, std::size_t numel, std::size_t parameter) {
  switch (id_of(codec)) {
    case CodecId::fp16: return max_fp16(numel, parameter);
    case CodecId::bf16: return max_bf16(numel);
    case CodecId::int8: return max_int8(numel, parameter);
    case CodecId::int4: return max_int4(numel, parameter);
    case CodecId::onebit: return max_onebit(numel, parameter);
    case CodecId::threshold: return max_threshold(numel);
    case CodecId::topk: return max_topk(parameter);
    case CodecId::any: break;
  }
  throw ArgumentError("codec_max_bytes: which codec?");
}

void check_parameter(CodecId id, std::size_t parameter) {
  const bool has_block =
      id == CodecId::fp16 || id == CodecId::int8 || id == CodecId::int4 || id == CodecId::onebit;
  const bool is_block = parameter >= 32 && parameter <= 4096 && (parameter & (parameter - 1)) == 0;
  if (has_block && !is_block) throw ArgumentError("block must be a power of two from 32 to 4096");
}

nb::tuple encode(const std::string& codec, std::uintptr_t x, std::uintptr_t residual, std::size_t numel,
                 std::uintptr_t out, std::size_t capacity, int source, bool checksum, std::size_t parameter,
                 float tau, bool entropy, bool stochastic, std::uint64_t key) {
  const CodecId id = id_of(codec);
  check_parameter(id, parameter);
  const EncoderInput in{floats(x), mutable_floats(residual), numel, static_cast<SourceType>(source),
                        checksum};
  const EncoderOutput target{reinterpret_cast<std::uint8_t*>(out), capacity};
  const Rounding rounding{stochastic, key};
  std::size_t bytes = 0;
  std::uint64_t skipped = 0;
  {
    nb::gil_scoped_release release;
    switch (id) {
      case CodecId::fp16: bytes = encode_fp16(in, parameter, target); break;
      case CodecId::bf16: bytes = encode_bf16(in, target); break;
      case CodecId::int8: bytes = encode_int8(in, parameter, rounding, target); break;
      case CodecId::int4: bytes = encode_int4(in, parameter, rounding, target); break;
      case CodecId::onebit: bytes = encode_onebit(in, parameter, target); break;
      case CodecId::threshold: bytes = encode_threshold(in, tau, entropy, target, &skipped); break;
      case CodecId::topk: bytes = encode_topk(in, parameter, entropy, target); break;
      case CodecId::any: throw ArgumentError("codec_encode: which codec?");
    }
  }
  return nb::make_tuple(bytes, skipped);
}

void decode_into(const std::string& codec, std::uintptr_t payload, std::size_t payload_bytes,
                 std::uintptr_t out, std::size_t numel, bool accumulate) {
  const CodecId id = id_of(codec);
  nb::gil_scoped_release release;
  decode(reinterpret_cast<const std::uint8_t*>(payload), payload_bytes, id, mutable_floats(out), numel,
         accumulate);
}

}  // namespace

void bind_codecs(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const PayloadError& error) {
      const nb::object type = nb::module_::import_("paceline.errors").attr("ProtocolError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });
  m.def("codec_max_bytes", &max_bytes, nb::arg("codec"), nb::arg("numel"), nb::arg("parameter"));
  m.def("codec_encode", &encode, nb::arg("codec"), nb::arg("x"), nb::arg("residual"), nb::arg("numel"),
        nb::arg("out"), nb::arg("capacity"), nb::kw_only(), nb::arg("source") = 0,
        nb::arg("checksum") = false, nb::arg("parameter") = 0, nb::arg("tau") = 0.0f,
        nb::arg("entropy") = false, nb::arg("stochastic") = false, nb::arg("key") = 0,
        "Encode float32 at address x (plus the residual, 0 for none); returns (bytes, elements not finite).");
  m.def("codec_decode", &decode_into, nb::arg("codec"), nb::arg("payload"), nb::arg("payload_bytes"),
        nb::arg("out"), nb::arg("numel"), nb::arg("accumulate"),
        "Decode into float32 at address out; ProtocolError leaves it untouched.");
  m.def(
      "codec_limit_isa", [](int limit) { limit_isa(static_cast<Isa>(limit)); }, nb::arg("limit"),
      "For tests: 0 baseline, 1 AVX2, 2 AVX-512 at most.");
  m.def("codec_isa", [] { return static_cast<int>(isa()); });
}

}  // namespace paceline::bind
