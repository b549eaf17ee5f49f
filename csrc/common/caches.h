// The processor's caches, in bytes: what blocks of work are made to fit. They change no bit of a result: sums
// are divided by the shapes alone.
#pragma once

#include <cstdint>

namespace peftcore {

struct Caches {
    int64_t first = 32 << 10;  // of a core, for data
    int64_t second = 1 << 20;  // of a core
    int64_t third = 32 << 20;  // shared
};

// Of this machine, read once; where it does not tell, or what it tells cannot be, as above.
const Caches& caches();

// For tests. No operator may run meanwhile.
void set_caches(const Caches& caches);

// What stands on a thread's stack has its size when compiled: for the smallest caches there are.
constexpr int64_t kSmallestFirst = 32 << 10, kSmallestSecond = 256 << 10;

}  // namespace peftcore
