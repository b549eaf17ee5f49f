#include "common/cuda_dispatch.cuh"
#include "common/cuda_sum.h"

namespace peftcore {
namespace {

constexpr int kThreads = 128;

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

}  // namespace
}  // namespace peftcore

extern "C" const char* peftcore_sum(const float* partial, int64_t parts, int64_t count, float scale,
                                    void* out, int dtype, void* stream) {
    using namespace peftcore;
    if (count == 0) return nullptr;
    return dispatch_dtype(Dtype(dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        return PEFTCORE_LAUNCH(sum_kernel<T>, blocks_once(count, kThreads), kThreads, 0, stream, partial,
                               parts, count, scale, static_cast<T*>(out));
    });
}
