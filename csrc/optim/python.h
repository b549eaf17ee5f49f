#pragma once

#include <pybind11/pybind11.h>

namespace peftcore {
namespace optim {

// Adds the table of rules and the class PagedState to the module.
void bind_optim(pybind11::module_& m);

}  // namespace optim
}  // namespace peftcore
