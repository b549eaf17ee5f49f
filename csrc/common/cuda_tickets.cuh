// How blocks use counters (cuda_tickets.h), and read what other blocks of the launch have written.
#pragma once

#include "common/cuda_launch.cuh"

namespace peftcore {

// Number of blocks that took a ticket from this counter before; what they had written can be read. All threads of the
// block call it.
static __device__ __forceinline__ unsigned take_ticket(unsigned* counter) {
    PEFTCORE_SHARED(unsigned, ticket, [1]);
    __syncthreads();  // the block's writes come before its ticket
    if (threadIdx.x == 0) {
        __threadfence();
        ticket[0] = atomicAdd(counter, 1u);
        __threadfence();
    }
    __syncthreads();
    return ticket[0];
}

// Number of tickets taken by now; what those blocks had written can be read.
static __device__ __forceinline__ unsigned read_counter(unsigned* counter) {
    PEFTCORE_SHARED(unsigned, seen, [1]);
    __syncthreads();
    if (threadIdx.x == 0) {
        seen[0] = atomicAdd(counter, 0u);
        __threadfence();
    }
    __syncthreads();
    return seen[0];
}

// Whether this is the last of `blocks` blocks to take a ticket. The last one resets the counter.
static __device__ __forceinline__ bool comes_last(unsigned* counter, unsigned blocks) {
    const bool last = take_ticket(counter) == blocks - 1;
    if (last && threadIdx.x == 0) *counter = 0;
    return last;
}

// sum[i] = partial[0][at[i]] + partial[1][at[i]] + ..., in the order of peftcore_sum, whichever block comes last. They
// are read from the L2 cache: L1 might hold older values.
template <int kCount>
__device__ __forceinline__ void ordered_sums(const float* partial, int64_t parts, int64_t stride,
                                             const int64_t (&at)[kCount], float (&sum)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = 0;
#pragma unroll 4
    for (int64_t part = 0; part < parts; ++part)
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] += __ldcg(partial + part * stride + at[i]);
}

}  // namespace peftcore
