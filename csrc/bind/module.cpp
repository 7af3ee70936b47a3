#include "bind/bind.h"

NB_MODULE(_core, m) {
  m.doc() = "Paceline's C++ core: raw pointers in, no coupling to torch.";
  // Tensors and the engine may outlive the module at exit; their memory goes with the process.
  nanobind::set_leak_warnings(false);
  paceline::bind::bind_crc32c(m);
  paceline::bind::bind_codecs(m);
  paceline::bind::bind_tensor(m);
  paceline::bind::bind_reductions(m);
  paceline::bind::bind_plan(m);
  paceline::bind::bind_fabric(m);
}
