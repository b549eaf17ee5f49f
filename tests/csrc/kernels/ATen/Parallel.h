// Where kernels are built without PyTorch: its loops, in one thread.
#pragma once

#include <cstdint>

namespace at {

inline int get_num_threads() { return 1; }
inline int get_thread_num() { return 0; }
inline bool in_parallel_region() { return false; }

template <typename Body>
void parallel_for(int64_t first, int64_t last, int64_t, const Body& body) {
    if (first < last) body(first, last);
}

}  // namespace at
