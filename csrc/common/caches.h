// Sizes of the processor's caches in bytes, to which blocks of work are fitted. No result depends on them, because sums are
// divided by shape only.
#pragma once

#include <cstdint>

namespace peftcore {

struct Caches {
    int64_t first = 32 << 10;  // of a core, for data
    int64_t second = 1 << 20;  // of a core
    int64_t third = 32 << 20;  // shared
};

// Caches of this machine, read once; the defaults above where it reports none or impossible sizes.
const Caches& caches();

// For tests: no operator may be running.
void set_caches(const Caches& caches);

// Buffers on a thread's stack have sizes fixed at compile time, for the smallest caches in use.
constexpr int64_t kSmallestFirst = 32 << 10, kSmallestSecond = 256 << 10;

}  // namespace peftcore
