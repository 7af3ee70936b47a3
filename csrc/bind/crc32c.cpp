#include "core/base/crc32c.h"

#include "bind/bind.h"

namespace nb = nanobind;

namespace paceline::bind {

void bind_crc32c(nb::module_& m) {
  m.def(
      "crc32c",
      [](nb::handle data, std::uint32_t crc) {
        Py_buffer view;
        if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
        {
          nb::gil_scoped_release release;
          crc = crc32c(crc, view.buf, static_cast<std::size_t>(view.len));
        }
        PyBuffer_Release(&view);
        return crc;
      },
      nb::arg("data"), nb::arg("crc") = 0u, "CRC-32C of a bytes-like object, continuing from `crc`.");
}

}  // namespace paceline::bind
