// Adds the partial sums of a kernel's blocks in a fixed order: every run gives the same bits.
#pragma once

#include <cstdint>

// out[i] = scale (partial[0][i] + partial[1][i] + ...), partial [parts, count] of fp32, rounded once to `dtype`.
// Pointers are device memory. Returns nullptr, or why the launch failed.
extern "C" const char* peftcore_sum(const float* partial, int64_t parts, int64_t count, float scale,
                                    void* out, int dtype, void* stream);
