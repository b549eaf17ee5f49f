// How blocks divide a sum, use counters (cuda_tickets.h), and read what other blocks of the launch have written.
#pragma once

#include "common/cuda_launch.cuh"
#include "common/integers.h"

namespace peftcore {

// Parts of a sum that is divided among blocks, each of `size` terms but the last, which may have fewer.
struct Parts {
    int64_t count, size;
};

// Divides `terms` into `target` parts, but at most `most` and at least one. All but the last are whole stages of `stage`
// terms.
inline Parts parts_of(int64_t terms, int64_t stage, int64_t target, int64_t most) {
    const int64_t count = least(target, most);
    const int64_t size = filled_up(count > 1 ? ceil_div(terms, count) : terms, stage);
    return size == 0 ? Parts{1, stage} : Parts{ceil_div(terms, size), size};
}

// What a ticket orders besides itself. A __threadfence on both sides of a relaxed atomic would order as much, but it is
// compiled to MEMBAR.SC, which is sequentially consistent and slower than a release.
enum class Order {
    kNone,     // nothing: which work a block takes
    kRelease,  // the block's writes before it are visible to blocks that see the ticket by kAcquireRelease or by
               // read_counter
    kAcquireRelease,  // also, what the blocks with earlier tickets had written can be read
};

#if defined(PEFTCORE_EMULATOR)

template <Order order>
static __device__ __forceinline__ unsigned add_one(unsigned* counter) {
    return atomicAdd(counter, 1u);
}

static __device__ __forceinline__ unsigned load_acquire(unsigned* counter) { return atomicAdd(counter, 0u); }

#else

template <Order order>
static __device__ __forceinline__ unsigned add_one(unsigned* counter) {
    unsigned before;
    if (order == Order::kNone)
        asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    else if (order == Order::kRelease)
        asm volatile("atom.release.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    else
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

static __device__ __forceinline__ unsigned load_acquire(unsigned* counter) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

#endif

// Takes a ticket: returns the number of blocks that took one from this counter before. All threads of the block call it,
// and the order holds for all of them: the barriers extend it from the first thread to the block.
template <Order order>
static __device__ __forceinline__ unsigned take_ticket(unsigned* counter) {
    PEFTCORE_SHARED(unsigned, ticket, [1]);
    __syncthreads();  // the block's writes come before its ticket
    if (threadIdx.x == 0) ticket[0] = add_one<order>(counter);
    __syncthreads();
    return ticket[0];
}

// Number of tickets taken by now; what those blocks had written can be read.
static __device__ __forceinline__ unsigned read_counter(unsigned* counter) {
    PEFTCORE_SHARED(unsigned, seen, [1]);
    __syncthreads();
    if (threadIdx.x == 0) seen[0] = load_acquire(counter);
    __syncthreads();
    return seen[0];
}

// Whether this is the last of `blocks` blocks to take a ticket. The last one resets the counter.
static __device__ __forceinline__ bool comes_last(unsigned* counter, unsigned blocks) {
    const bool last = take_ticket<Order::kAcquireRelease>(counter) == blocks - 1;
    if (last && threadIdx.x == 0) *counter = 0;
    return last;
}

// Where one of a block's sums is in a part and in the result. Not `inside`: it is none of them.
struct SumPlace {
    bool inside;
    int64_t at;
};

// store(at, term(0, at) + term(1, at) + ...) of `parts` terms, in this order, for the places of `count` sums of a block,
// place(0) and so on. kEach: sums that a thread waits for together.
template <int kThreads, int kEach, typename Place, typename Term, typename Store>
__device__ __forceinline__ void add_in_order(int count, unsigned parts, const Place& place, const Term& term,
                                             const Store& store) {
    for (int first = 0; first < count; first += kEach * kThreads) {
        int64_t at[kEach];
        float sum[kEach] = {};
        bool inside[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const SumPlace sum_place = place(first + i * kThreads + int(threadIdx.x));
            inside[i] = sum_place.inside;
            at[i] = sum_place.inside ? sum_place.at : 0;
        }
#pragma unroll 4
        for (unsigned part = 0; part < parts; ++part)
#pragma unroll
            for (int i = 0; i < kEach; ++i) sum[i] += term(part, at[i]);
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (inside[i]) store(at[i], sum[i]);
    }
}

// The last step of blocks that share a result. Each block has written its partial sums to [parts, stride]; the block that
// finishes last adds them, always in the order of peftcore_sum. It reads them from the L2 cache, because L1 might hold old
// values. Without a `counter` nothing is added here: another launch (peftcore_sum) does that. kCount: sums of a block.
template <int kThreads, int kCount, int kEach, typename Place, typename Store>
__device__ __forceinline__ void add_by_last(unsigned* counter, const float* partial, unsigned parts,
                                            int64_t stride, const Place& place, const Store& store) {
    static_assert(kCount % (kEach * kThreads) == 0, "");
    if (counter == nullptr || !comes_last(counter, parts)) return;
    const auto term = [&](unsigned part, int64_t at) { return __ldcg(partial + part * stride + at); };
    add_in_order<kThreads, kEach>(kCount, parts, place, term, store);
}

}  // namespace peftcore
