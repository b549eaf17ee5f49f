#include "common/cuda_launch.cuh"
#include "common/cuda_sum.h"
#include "common/dtype.h"
#include "common/half.h"

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

template <typename T>
const char* launch_sum(const float* partial, int64_t parts, int64_t count, float scale, void* out,
                       void* stream) {
    return PEFTCORE_LAUNCH(sum_kernel<T>, blocks_once(count, kThreads), kThreads, 0, stream, partial, parts,
                           count, scale, static_cast<T*>(out));
}

}  // namespace
}  // namespace peftcore

extern "C" const char* peftcore_sum(const float* partial, int64_t parts, int64_t count, float scale,
                                    void* out, int dtype, void* stream) {
    using namespace peftcore;
    if (count == 0) return nullptr;
    switch (Dtype(dtype)) {
        case Dtype::kFloat:
            return launch_sum<float>(partial, parts, count, scale, out, stream);
        case Dtype::kHalf:
            return launch_sum<Half>(partial, parts, count, scale, out, stream);
        case Dtype::kBFloat16:
            return launch_sum<BFloat16>(partial, parts, count, scale, out, stream);
    }
    return "unknown dtype";
}
