#include "common/caches.h"

#include <algorithm>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace peftcore {
namespace {

// A virtual machine may report no caches, or all of its host's.
int64_t sane(int64_t reported, int64_t fallback, int64_t smallest, int64_t largest) {
    return reported < smallest ? fallback : std::min(reported, largest);
}

Caches read() {
    Caches caches;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    caches.first = sane(sysconf(_SC_LEVEL1_DCACHE_SIZE), caches.first, kSmallestFirst, 256 << 10);
    caches.second = sane(sysconf(_SC_LEVEL2_CACHE_SIZE), caches.second, kSmallestSecond, 16 << 20);
    caches.third = sane(sysconf(_SC_LEVEL3_CACHE_SIZE), caches.third, 2 << 20, int64_t(1) << 30);
#endif
    return caches;
}

Caches& storage() {
    static Caches caches = read();
    return caches;
}

}  // namespace

const Caches& caches() { return storage(); }

void set_caches(const Caches& caches) { storage() = caches; }

}  // namespace peftcore
