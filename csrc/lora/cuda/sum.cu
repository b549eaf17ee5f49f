// Second passes and dropout alone: memory goes through once, a value a thread.
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int64_t kMaxBlocks = 4096;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* partial, int64_t parts, int64_t count, float scale, T* out) {
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
         i += int64_t(gridDim.x) * kThreads) {
        float total = 0;
        for (int64_t part = 0; part < parts; ++part) total += partial[part * count + i];
        out[i] = from_float<T>(scale * total);
    }
}

// A thread takes the eight columns of a counter.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    drop_kernel(const T* x, int64_t rows, int64_t columns, const Dropout dropout, T* out) {
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

unsigned blocks_for(int64_t count) {
    const int64_t wanted = (count + kThreads - 1) / kThreads;
    return unsigned(wanted < kMaxBlocks ? wanted : kMaxBlocks);
}

template <typename T>
const char* launch_sum(const float* partial, int64_t parts, int64_t count, float scale, void* out,
                       void* stream) {
    return PEFTCORE_LAUNCH(sum_kernel<T>, blocks_for(count), kThreads, 0, stream, partial, parts, count,
                           scale, static_cast<T*>(out));
}

template <typename T>
const char* launch_drop(const Wide& x, const Dropout& dropout, void* out, void* stream) {
    const int64_t rows = x.rows, columns = x.columns;
    const int64_t groups = (columns + kColumnsPerCounter - 1) / kColumnsPerCounter;
    return PEFTCORE_LAUNCH(drop_kernel<T>, blocks_for(rows * groups), kThreads, 0, stream,
                           static_cast<const T*>(x.values), rows, columns, dropout, static_cast<T*>(out));
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" const char* peftcore_lora_sum(const float* partial, int64_t parts, int64_t count, float scale,
                                         void* out, int dtype, void* stream) {
    using namespace peftcore::lora;
    if (count == 0) return nullptr;
    switch (Dtype(dtype)) {
        case Dtype::kFloat:
            return launch_sum<float>(partial, parts, count, scale, out, stream);
        case Dtype::kHalf:
            return launch_sum<peftcore::Half>(partial, parts, count, scale, out, stream);
        case Dtype::kBFloat16:
            return launch_sum<peftcore::BFloat16>(partial, parts, count, scale, out, stream);
    }
    return "unknown dtype";
}

extern "C" const char* peftcore_lora_drop(const peftcore::lora::Wide* x,
                                          const peftcore::lora::Dropout* dropout, void* out, void* stream) {
    using namespace peftcore::lora;
    if (x->rows == 0 || x->columns == 0) return nullptr;
    switch (x->dtype) {
        case Dtype::kFloat:
            return launch_drop<float>(*x, *dropout, out, stream);
        case Dtype::kHalf:
            return launch_drop<peftcore::Half>(*x, *dropout, out, stream);
        case Dtype::kBFloat16:
            return launch_drop<peftcore::BFloat16>(*x, *dropout, out, stream);
    }
    return "unknown dtype";
}
