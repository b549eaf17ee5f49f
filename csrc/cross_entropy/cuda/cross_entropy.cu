// Cross-entropy of rows of logits, and its gradient in their place: a block reads its row twice and writes it once.
#include <cmath>

#include "common/cuda_dispatch.cuh"
#include "cross_entropy/cuda/cross_entropy_cuda.h"

namespace peftcore {
namespace cross_entropy {
namespace {

constexpr int kCrossEntropyThreads = 256;

__device__ __forceinline__ float no_logit() { return bits_float(0xff800000u); }  // minus infinity
__device__ __forceinline__ float not_a_number() { return bits_float(0x7fc00000u); }

__device__ __forceinline__ float capped_logit(const CrossEntropyCall& call, float x) {
    return call.cap == 0 ? x * call.scale : call.cap * tanhf(x * (call.scale / call.cap));
}

// Running maximum, Σ e^(z - maximum), Σ e^(z - maximum) (z - maximum), and Σ w z.
struct RowSums {
    float maximum, exponentials, products, weighted;

    __device__ __forceinline__ void raise_to(float value) {
        if (maximum != no_logit()) {
            const float step = maximum - value, factor = expf(step);
            products = factor * (products + exponentials * step);
            exponentials *= factor;
        }
        maximum = value;
    }
    __device__ __forceinline__ void add(float z) {
        if (!(z <= maximum)) raise_to(z);
        if (maximum == no_logit()) return;
        const float below = z - maximum, e = expf(below);
        exponentials += e;
        if (e > 0) products += e * below;
    }
    __device__ __forceinline__ void add(RowSums other) {
        if (other.maximum > maximum)
            raise_to(other.maximum);
        else if (maximum > other.maximum)
            other.raise_to(maximum);
        exponentials += other.exponentials;
        products += other.products;
        weighted += other.weighted;
    }
};

template <typename T>
__global__ void __launch_bounds__(kCrossEntropyThreads) cross_entropy_kernel(CrossEntropyCall call) {
    PEFTCORE_SHARED(RowSums, shared, [kCrossEntropyThreads]);
    const int64_t row = blockIdx.x, label = call.labels[row];
    const int thread = threadIdx.x;
    T* x = static_cast<T*>(call.x) + row * call.columns;
    float* out = call.out + row;
    if (label == call.ignore_index) {
        if (thread < 3) out[thread * call.rows] = 0;
        if (call.gradient)
            for (int64_t c = thread; c < call.columns; c += kCrossEntropyThreads) x[c] = from_float<T>(0.0f);
        return;
    }
    const bool valid = label >= 0 && label < call.columns;
    const int64_t target = valid ? label : 0;
    const float z_target = capped_logit(call, to_float(x[target]));

    RowSums sums = {no_logit(), 0, 0, 0};
    for (int64_t c = thread; c < call.columns; c += kCrossEntropyThreads) {
        const float z = capped_logit(call, to_float(x[c]));
        sums.add(z);
        if (call.smoothing != 0) sums.weighted += call.weights == nullptr ? z : z * call.weights[c];
    }
    shared[thread] = sums;
    for (int half = kCrossEntropyThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) {
            sums.add(shared[thread + half]);
            shared[thread] = sums;
        }
    }
    __syncthreads();
    sums = shared[0];

    const float total = call.total_weight == nullptr ? float(call.columns) : *call.total_weight;
    const float of_label = (1 - call.smoothing) * (call.weights == nullptr ? 1.0f : call.weights[target]);
    const float uniform = call.smoothing / float(call.columns);
    const float log = logf(sums.exponentials), lse = sums.maximum + log;
    if (thread == 0) {
        float loss = of_label * ((sums.maximum - z_target) + log) + call.z_loss * lse * lse;
        if (call.smoothing != 0) loss += uniform * (total * lse - sums.weighted);
        out[0] = valid ? loss : not_a_number();
        out[call.rows] = lse;
        out[2 * call.rows] = log - sums.products / sums.exponentials;
    }
    if (!call.gradient) return;
    const float factor = call.grad_scale == nullptr ? 1.0f : *call.grad_scale;
    const float of_softmax = (of_label + uniform * total + 2 * call.z_loss * lse) / sums.exponentials;
    for (int64_t c = thread; c < call.columns; c += kCrossEntropyThreads) {
        const float z = capped_logit(call, to_float(x[c]));
        float grad = of_softmax * expf(z - sums.maximum);
        if (uniform != 0) grad -= call.weights == nullptr ? uniform : uniform * call.weights[c];
        if (c == target) grad -= valid ? of_label : not_a_number();
        const float tangent = call.cap == 0 ? 0.0f : z / call.cap;
        x[c] = from_float<T>(grad * (factor * call.scale) * (1 - tangent * tangent));
    }
}

}  // namespace
}  // namespace cross_entropy
}  // namespace peftcore

extern "C" const char* peftcore_cross_entropy_rows(const peftcore::cross_entropy::CrossEntropyCall* call,
                                                   void* stream) {
    using namespace peftcore::cross_entropy;
    if (call->rows == 0) return nullptr;
    return peftcore::dispatch_dtype(call->dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        return PEFTCORE_LAUNCH(cross_entropy_kernel<T>, call->rows, kCrossEntropyThreads, 0, stream, *call);
    });
}
