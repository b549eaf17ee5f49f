#pragma once

#include <pybind11/pybind11.h>

namespace peftcore {
namespace optim {

// Adds the class PagePool to the module.
void bind_pool(pybind11::module_& m);

}  // namespace optim
}  // namespace peftcore
