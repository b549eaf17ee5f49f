// The operators' kernel for autograd.
#pragma once

#include <string>

namespace peftcore {

// Gives an operator the kernel for autograd that raises a RuntimeError where a gradient would be lost.
void refuse_gradients(const std::string& name);

}  // namespace peftcore
