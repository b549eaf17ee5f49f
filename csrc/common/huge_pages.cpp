#include "common/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace peftcore {

void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kHugePage = int64_t(2) << 20;
    if (bytes < 2 * kHugePage) return;  // it may cross a page boundary and contain no whole huge page
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (at + page - 1) / page * page, end = (at + uintptr_t(bytes)) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // if refused, pages stay small
#endif
}

}  // namespace peftcore
