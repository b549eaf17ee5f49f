// Pages of 2 MiB for what is read whole again and again: of those of 4 KiB a processor looks every one up.
#pragma once

#include <cstdint>

namespace peftcore {

// Asks for them, if `memory` is large and not yet written, where the system has them for who asks (on Linux
// transparent_hugepage, "madvise" or "always"); no more of it is used than else.
void ask_for_huge_pages(void* memory, int64_t bytes);

}  // namespace peftcore
