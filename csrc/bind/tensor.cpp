#include "bind/tensor.h"

#include <nanobind/stl/vector.h>

#include <vector>

#include "bind/bind.h"

namespace nb = nanobind;

namespace paceline::bind {
namespace {

// The part of the DLPack standard, version 1, that is needed here.
struct TensorView {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t num_dims;
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null if contiguous
  std::uint64_t offset_bytes;
};
struct TensorExchange {
  std::uint32_t major, minor;
  TensorExchange* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view)(void* object, TensorView* out);  // may be null
  void* current_stream;
};
constexpr std::int32_t cpu = 1;
enum TypeCode : std::uint8_t {
  signed_int = 0,
  unsigned_int = 1,
  floating = 2,
  bfloat = 4,
  complex = 5,
  boolean = 6
};

TensorExchange* exchange = nullptr;
std::vector<PyTypeObject*> types;  // exactly these: other subclasses may keep their memory elsewhere

std::optional<DType> dtype_of(const TensorView& v) {
  if (v.lanes != 1) return {};
  switch (v.code << 8 | v.bits) {
    case signed_int << 8 | 8: return DType::int8;
    case signed_int << 8 | 16: return DType::int16;
    case signed_int << 8 | 32: return DType::int32;
    case signed_int << 8 | 64: return DType::int64;
    case unsigned_int << 8 | 8: return DType::uint8;
    case unsigned_int << 8 | 16: return DType::uint16;
    case unsigned_int << 8 | 32: return DType::uint32;
    case unsigned_int << 8 | 64: return DType::uint64;
    case floating << 8 | 16: return DType::float16;
    case floating << 8 | 32: return DType::float32;
    case floating << 8 | 64: return DType::float64;
    case bfloat << 8 | 16: return DType::bfloat16;
    case complex << 8 | 64: return DType::complex64;
    case complex << 8 | 128: return DType::complex128;
    case boolean << 8 | 8: return DType::boolean;
    default: return {};
  }
}

}  // namespace

std::optional<TensorMemory> memory_of(nb::handle tensor) {
  PyTypeObject* const type = Py_TYPE(tensor.ptr());
  bool is_known = false;
  for (PyTypeObject* const known : types) is_known |= type == known;
  TensorView v{};
  if (!is_known) return {};
  if (exchange->view(tensor.ptr(), &v) !=
      0) {  // for example sparse: the caller finds the reason in another way
    PyErr_Clear();
    return {};
  }
  const std::optional<DType> dtype = dtype_of(v);
  if (v.device_type != cpu || !dtype) return {};
  std::int64_t numel = 1;
  for (std::int32_t d = v.num_dims - 1; d >= 0; --d) {
    if (v.strides && v.shape[d] != 1 && v.strides[d] != numel) return {};
    numel *= v.shape[d];
  }
  return TensorMemory{static_cast<std::byte*>(v.data) + v.offset_bytes, static_cast<std::size_t>(numel),
                      *dtype};
}

void bind_tensor(nb::module_& m) {
  m.def(
      "register_tensor_types",
      [](const nb::capsule& api, const std::vector<nb::type_object>& classes) {
        auto* const found = static_cast<TensorExchange*>(api.data("dlpack_exchange_api"));
        if (found->major != 1 || !found->view) return false;
        exchange = found;
        types.clear();
        for (const nb::type_object& c : classes) types.push_back(reinterpret_cast<PyTypeObject*>(c.ptr()));
        return true;
      },
      "Tensors of exactly these classes are read through the functions of `api` from now on; false if its "
      "version is not"
      " supported.");
}

}  // namespace paceline::bind
