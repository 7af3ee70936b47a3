// One function per binding unit; module.cpp calls them all.
#pragma once
#include <nanobind/nanobind.h>

namespace paceline::bind {

void bind_crc32c(nanobind::module_& m);
void bind_codecs(nanobind::module_& m);
void bind_tensor(nanobind::module_& m);
void bind_reductions(nanobind::module_& m);
void bind_plan(nanobind::module_& m);
void bind_fabric(nanobind::module_& m);

}  // namespace paceline::bind
