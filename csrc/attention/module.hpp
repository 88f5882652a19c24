#pragma once
#include <pybind11/pybind11.h>

namespace dasd {
void add_attention(pybind11::module_& m);
}
