// y = act(g) ∘ u and its gradients, each in one pass over memory: a vector of 16 bytes a thread at a time, in fp32.
#include <cmath>

#include "common/alignment.h"
#include "common/cuda_dispatch.cuh"
#include "common/integers.h"
#include "common/typed.cuh"
#include "elementwise/cuda/gated_cuda.h"

namespace peftcore {
namespace elementwise {
namespace {

constexpr int kGatedThreads = 256;

// act is x · share, share = 1 / (1 + e^-p), which is 0 far below 0; slope is that of act, NaN at infinity. Powers of x and
// e^-p do not overflow: far out, where they would, share is 0 or 1 anyway.
struct Logistic {
    float share, slope;

    __device__ __forceinline__ Logistic(const GatedCall& call, float x) {
        const float near = fminf(fmaxf(x, -10000.0f), 10000.0f), square = near * near;
        const float z = -near * (call.linear + call.cubic * square), e = expf(fminf(z, 88.0f));
        share = z < 88.0f ? 1.0f / (1.0f + e) : 0.0f;
        slope = share * (1.0f + near * (e * share) * (call.linear + 3.0f * call.cubic * square)) + (x - x);
    }
};

// Calls body(where in gate and up, where in y, how many values) for each vector of this thread. The last one of a row
// may have fewer values.
template <int kVector, typename Body>
__device__ __forceinline__ void for_vectors(const GatedCall& call, const Body& body) {
    const int64_t of_row = ceil_div(call.columns, kVector), count = call.rows * of_row;
    for (int64_t i = int64_t(blockIdx.x) * kGatedThreads + threadIdx.x; i < count;
         i += int64_t(gridDim.x) * kGatedThreads) {
        const int64_t row = call.rows == 1 ? 0 : i / of_row, column = (i - row * of_row) * kVector;
        body(row * call.stride + column, row * call.columns + column, call.columns - column);
    }
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kGatedThreads) gated_kernel(const GatedCall call) {
    for_vectors<kVector>(call, [&](int64_t from, int64_t to, int64_t count) {
        const auto gate = load_some<kVector>(static_cast<const T*>(call.gate) + from, count);
        const auto up = load_some<kVector>(static_cast<const T*>(call.up) + from, count);
        Vector<T, kVector> y;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float g = to_float(gate.item[j]);
            float activated = g * Logistic(call, g).share;
            if (call.rounded) activated = to_float(from_float<T>(activated));
            y.item[j] = from_float<T>(activated * to_float(up.item[j]));
        }
        store_some(static_cast<T*>(call.y) + to, y, count);
    });
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kGatedThreads) gated_backward_kernel(const GatedCall call) {
    for_vectors<kVector>(call, [&](int64_t from, int64_t to, int64_t count) {
        const auto gate = load_some<kVector>(static_cast<const T*>(call.gate) + from, count);
        const auto up = load_some<kVector>(static_cast<const T*>(call.up) + from, count);
        const auto grad = load_some<kVector>(static_cast<const T*>(call.dy) + to, count);
        Vector<T, kVector> dgate, dup;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float g = to_float(gate.item[j]), dy = to_float(grad.item[j]);
            const Logistic s(call, g);
            dgate.item[j] = from_float<T>(dy * to_float(up.item[j]) * s.slope);
            dup.item[j] = from_float<T>(dy * g * s.share);
        }
        store_some(static_cast<T*>(call.dgate) + from, dgate, count);
        store_some(static_cast<T*>(call.dup) + from, dup, count);
    });
}

// body(a tag of the dtype, the number of values of a vector, the number of blocks).
template <typename Body>
const char* dispatch_vectors(const GatedCall& call, const Body& body) {
    return dispatch_dtype(call.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        constexpr int kWidest = 16 / sizeof(T);
        const bool rows = call.rows == 1 || (call.columns % kWidest == 0 && call.stride % kWidest == 0);
        const bool vectors = rows && is_aligned(call.gate) && is_aligned(call.up) && is_aligned(call.y) &&
                             is_aligned(call.dy) && is_aligned(call.dgate) && is_aligned(call.dup);
        return dispatch_flag(vectors, [&](auto whole) {
            constexpr int kVector = decltype(whole)::value ? kWidest : 1;
            const int64_t count = call.rows * ceil_div(call.columns, kVector);
            return body(type, std::integral_constant<int, kVector>(), blocks_once(count, kGatedThreads));
        });
    });
}

}  // namespace
}  // namespace elementwise
}  // namespace peftcore

extern "C" const char* peftcore_gated(const peftcore::elementwise::GatedCall* call, void* stream) {
    using namespace peftcore::elementwise;
    if (call->rows == 0 || call->columns == 0) return nullptr;
    return dispatch_vectors(*call, [&](auto type, auto vector, unsigned blocks) {
        using T = typename decltype(type)::type;
        return PEFTCORE_LAUNCH((gated_kernel<T, decltype(vector)::value>), blocks, kGatedThreads, 0, stream,
                               *call);
    });
}

extern "C" const char* peftcore_gated_backward(const peftcore::elementwise::GatedCall* call, void* stream) {
    using namespace peftcore::elementwise;
    if (call->rows == 0 || call->columns == 0) return nullptr;
    return dispatch_vectors(*call, [&](auto type, auto vector, unsigned blocks) {
        using T = typename decltype(type)::type;
        return PEFTCORE_LAUNCH((gated_backward_kernel<T, decltype(vector)::value>), blocks, kGatedThreads, 0,
                               stream, *call);
    });
}
