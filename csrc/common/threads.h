// Threads that a parallel loop would have here.
#pragma once

#include <ATen/Parallel.h>

namespace peftcore {

// One within another's loop: PyTorch nests none.
inline int64_t threads_here() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace peftcore
