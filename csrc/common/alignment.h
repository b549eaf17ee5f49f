// Alignment of addresses, for host and device.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace peftcore {

// Whether the address is a multiple of `bytes`: of 16 for the widest loads and stores of a thread, cp.async and
// ldmatrix.
static PEFTCORE_HD bool is_aligned(const void* pointer, int bytes = 16) {
    return reinterpret_cast<uintptr_t>(pointer) % unsigned(bytes) == 0;
}

}  // namespace peftcore
