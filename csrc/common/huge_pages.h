// Pages of 2 MiB for memory that is read repeatedly: with pages of 4 KiB the processor's TLB misses on every page.
#pragma once

#include <cstdint>

namespace peftcore {

// Requests huge pages for `memory`, if it is large and not yet written, where the system grants them (on Linux with
// transparent_hugepage "madvise" or "always"). This uses no additional memory.
void ask_for_huge_pages(void* memory, int64_t bytes);

}  // namespace peftcore
