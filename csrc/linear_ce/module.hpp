#pragma once
#include <pybind11/pybind11.h>

namespace dasd {
void add_linear_ce(pybind11::module_& m);
}
