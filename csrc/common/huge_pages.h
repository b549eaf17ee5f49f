// Pages of 2 MiB for memory that is read repeatedly: with pages of 4 KiB the processor's TLB misses on every page. Where
// the system refuses (Linux grants them with transparent_hugepage "madvise" or "always"), pages stay small.
#pragma once

#include <cstdint>

namespace peftcore {

// Requests huge pages for `memory`, if it is large and not yet written. This uses no additional memory.
void ask_for_huge_pages(void* memory, int64_t bytes);

// Moves what is in `memory` into huge pages, in place, if it is large (Linux 6.1).
void move_into_huge_pages(void* memory, int64_t bytes);

}  // namespace peftcore
