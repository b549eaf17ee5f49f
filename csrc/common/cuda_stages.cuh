// Software pipeline of a sum: cp.async copies the operands to shared memory in stages. A ring of slots holds several
// stages, so that the next ones are being copied while one is multiplied.
#pragma once

#include "common/tensor_core.cuh"

namespace peftcore {

// Stages from `at` on, in strides of `step` up to `last`, which count what the caller counts: columns, rows. All but
// one of kStages slots are pending.
//
// fetch(at, slot): begins to copy a stage. arrived(at, slot): what a thread does with the bytes that it copied itself,
// before others read them. use(at, slot): reads the stage. All threads of a block call it.
template <int kStages, typename Fetch, typename Arrived, typename Use>
__device__ __forceinline__ void for_stages(int64_t at, int64_t last, int64_t step, const Fetch& fetch,
                                           const Arrived& arrived, const Use& use) {
    static_assert(kStages >= 2, "");
    const auto fetch_or_none = [&](int64_t ahead, int slot) {
        if (ahead < last) fetch(ahead, slot);
        cp_async_commit();  // also without a stage: waits count these groups
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetch_or_none(at + s * step, s);
    int slot = 0;
    for (; at < last; at += step) {
        cp_async_wait<kStages - 2>();
        arrived(at, slot);
        __syncthreads();  // this stage has arrived, and the previous one has been read
        fetch_or_none(at + (kStages - 1) * step, (slot + kStages - 1) % kStages);
        use(at, slot);
        slot = (slot + 1) % kStages;
    }
    cp_async_wait<0>();
}

// The same with a single slot, for few stages: a stage is fetched when the previous one has been read. Calls fetch(at) and
// use(at); after the last stage the slot is free.
template <typename Fetch, typename Use>
__device__ __forceinline__ void for_stages_in_turn(int64_t at, int64_t last, int64_t step, const Fetch& fetch,
                                                   const Use& use) {
    for (; at < last; at += step) {
        fetch(at);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();  // this stage has arrived
        use(at);
        __syncthreads();  // and has been read
    }
}

}  // namespace peftcore
