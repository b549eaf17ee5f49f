// What the parts of the sanitized program share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

inline void require(bool condition, const char* what, int64_t count, int blocksize) {
    if (condition) return;
    printf("%s: count %lld, block size %d\n", what, (long long)count, blocksize);
    exit(1);
}

// Exactly `count` elements, plus `skip` in front to move it off its alignment.
template <typename T>
struct Array {
    Array(int64_t count, int64_t skip = 0)
        : memory(new T[count + skip]), data(memory.get() + skip), count(count) {}
    bool operator==(const Array& other) const {
        return count == other.count && (count == 0 || memcmp(data, other.data, count * sizeof(T)) == 0);
    }
    std::unique_ptr<T[]> memory;
    T* data;
    int64_t count;
};

int run_optim(uint64_t seed);
int run_grouped(uint64_t seed);
