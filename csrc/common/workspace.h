// Memory that a thread keeps between calls: on Linux a new large buffer costs a page fault for every 4 KiB.
#pragma once

#include <cstdint>

namespace peftcore {

// At least `bytes` of this thread's memory, on a 64-byte boundary; valid until the thread's next call. Throws
// std::bad_alloc.
void* workspace(int64_t bytes);

void free_workspace();

}  // namespace peftcore
