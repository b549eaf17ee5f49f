// Second passes of two sums, and dropout alone: one pass over memory, one value per thread.
#include "common/cuda_dispatch.cuh"
#include "common/integers.h"
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

// Two sums in a launch, the second in fp32.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_pair_kernel(const Sum first, const Sum second) {
    const int64_t count = first.count + second.count;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
         i += int64_t(gridDim.x) * kThreads) {
        const bool in_first = i < first.count;
        const int64_t at = in_first ? i : i - first.count;
        // Separately: a reference to one of the two would put both on the stack.
        const float* partial = in_first ? first.partial : second.partial;
        const int64_t parts = in_first ? first.parts : second.parts,
                      stride = in_first ? first.count : second.count;
        float total = 0;
        for (int64_t part = 0; part < parts; ++part) total += partial[part * stride + at];
        if (in_first)
            static_cast<T*>(first.out)[at] = from_float<T>(first.scale * total);
        else
            static_cast<float*>(second.out)[at] = second.scale * total;
    }
}

// A thread takes the eight columns of a counter.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    drop_kernel(const T* x, int64_t rows, int64_t columns, const Dropout dropout_arg, T* out) {
    const Dropout dropout = with_key(dropout_arg);
    const int64_t groups = (columns + kColumnsPerCounter - 1) / kColumnsPerCounter;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rows * groups;
         i += int64_t(gridDim.x) * kThreads) {
        const int64_t row = i / groups, group = i % groups;
        const PhiloxWords words = dropout_words(dropout, row, group);
#pragma unroll
        for (int within = 0; within < kColumnsPerCounter; ++within) {
            const int64_t column = group * kColumnsPerCounter + within;
            if (column >= columns) break;
            const int64_t at = row * columns + column;
            out[at] = keeps(words, within, dropout.threshold) ? x[at] : T{};
        }
    }
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" const char* peftcore_lora_sum_pair(const peftcore::lora::Sum* first, int dtype,
                                              const peftcore::lora::Sum* second, void* stream) {
    using namespace peftcore::lora;
    if (first->count + second->count == 0) return nullptr;
    return peftcore::dispatch_dtype(Dtype(dtype), [&](auto type) {
        return PEFTCORE_LAUNCH(sum_pair_kernel<typename decltype(type)::type>,
                               peftcore::blocks_once(first->count + second->count, kThreads), kThreads, 0,
                               stream, *first, *second);
    });
}

extern "C" const char* peftcore_lora_drop(const peftcore::lora::Wide* x, const peftcore::Dropout* dropout,
                                          void* out, void* stream) {
    using namespace peftcore::lora;
    if (x->rows == 0 || x->columns == 0) return nullptr;
    const int64_t groups = peftcore::ceil_div(x->columns, peftcore::kColumnsPerCounter);
    return peftcore::dispatch_dtype(x->dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        return PEFTCORE_LAUNCH(drop_kernel<T>, peftcore::blocks_once(x->rows * groups, kThreads), kThreads, 0,
                               stream, static_cast<const T*>(x->values), x->rows, x->columns, *dropout,
                               static_cast<T*>(out));
    });
}
