#include "common/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace peftcore {
namespace {

// Advises the system on the whole huge pages in `memory`. Less memory than two of them may contain none.
void advise([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes, [[maybe_unused]] int advice) {
#if defined(__linux__)
    constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
    if (bytes < int64_t(2 * kHugePage)) return;
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (at + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (at + uintptr_t(bytes)) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(begin), end - begin, advice);
#endif
}

}  // namespace

void ask_for_huge_pages(void* memory, int64_t bytes) {
    constexpr int kHugePage = 14;  // MADV_HUGEPAGE
    advise(memory, bytes, kHugePage);
}

void move_into_huge_pages(void* memory, int64_t bytes) {
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not name
    advise(memory, bytes, kCollapse);
}

}  // namespace peftcore
