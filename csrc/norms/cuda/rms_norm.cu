// RMSNorm and its gradients: a warp or a block of threads takes a row, of which it holds up to four vectors a thread in
// registers, so that memory is passed over once; what is left of longer rows comes from a cache the second time.
//
// The gradient of the weight is a kernel of its own, which few fine-tunings need: warps add rows by columns, and
// peftcore_sum adds the groups of rows in order. How rows are grouped depends on the shape alone.
#include <cmath>

#include "common/alignment.h"
#include "common/cuda_dispatch.cuh"
#include "common/integers.h"
#include "common/typed.cuh"
#include "norms/cuda/rms_norm_cuda.h"

namespace peftcore {
namespace norms {
namespace {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;
constexpr int kHeld = 4;              // vectors of a row that a thread holds
constexpr int64_t kRowsOfGroup = 64;  // of the weight's gradient, at least
constexpr int64_t kMostGroups = 128;
constexpr unsigned kFullWarp = 0xffffffffu;

// The row's sum, in every thread of its kWarps warps; `shared` is a value for each of a block's warps.
template <int kWarps>
__device__ __forceinline__ float sum_of_row(float value, float* shared) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
    if constexpr (kWarps > 1) {
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
        __syncthreads();
        value = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) value += shared[warp];
        __syncthreads();  // before the next row's sums
    }
    return value;
}

// offset + weight, from a column on.
template <int kVector>
__device__ __forceinline__ void load_gain(const RmsNormCall& call, int64_t column, float (&g)[kVector]) {
    const auto load = [&](const auto* weight) {
        const auto values = load_vector<kVector>(weight + column);
#pragma unroll
        for (int i = 0; i < kVector; ++i) g[i] = call.offset + to_float(values.item[i]);
    };
    if (call.weight_dtype == Dtype::kFloat)
        load(static_cast<const float*>(call.weight));
    else if (call.weight_dtype == Dtype::kHalf)
        load(static_cast<const Half*>(call.weight));
    else
        load(static_cast<const BFloat16*>(call.weight));
}

// Calls body(row, the first of this thread's columns) for each row of kWarps warps.
template <int kWarps, int kVector, typename Body>
__device__ __forceinline__ void for_rows(int64_t rows, const Body& body) {
    constexpr int kThreads = 32 * kWarps, kRows = kNormWarps / kWarps;
    for (int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kThreads; row < rows;
         row += int64_t(gridDim.x) * kRows)
        body(row, int64_t(threadIdx.x % kThreads) * kVector);
}

template <typename T, int kWarps, int kVector>
__global__ void __launch_bounds__(kNormThreads, 4) rms_norm_kernel(const RmsNormCall call) {
    PEFTCORE_SHARED(float, shared, [kNormWarps]);
    constexpr int64_t kStep = 32 * kWarps * kVector;
    const int64_t columns = call.columns;
    for_rows<kWarps, kVector>(call.rows, [&](int64_t row, int64_t first) {
        const T* x = static_cast<const T*>(call.x) + row * columns;
        T* y = static_cast<T*>(call.y) + row * columns;
        Vector<T, kVector> held[kHeld] = {};
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (first + i * kStep < columns) held[i] = load_vector<kVector>(x + first + i * kStep);
        float squares = 0;
        const auto add = [&](const Vector<T, kVector>& values) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) squares += to_float(values.item[j]) * to_float(values.item[j]);
        };
#pragma unroll
        for (int i = 0; i < kHeld; ++i) add(held[i]);
        for (int64_t column = first + kHeld * kStep; column < columns; column += kStep)
            add(load_vector<kVector>(x + column));
        const float mean = sum_of_row<kWarps>(squares, shared) / float(columns);
        const float r = 1.0f / sqrtf(mean + call.eps);
        if (first == 0) call.scale[row] = r;

        const auto write = [&](const Vector<T, kVector>& values, int64_t column) {
            float g[kVector];
            load_gain(call, column, g);
            Vector<T, kVector> result;
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                float normed = to_float(values.item[j]) * r;
                if (call.rounded) normed = to_float(from_float<T>(normed));
                result.item[j] = from_float<T>(normed * g[j]);
            }
            store_vector(y + column, result);
        };
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (first + i * kStep < columns) write(held[i], first + i * kStep);
        for (int64_t column = first + kHeld * kStep; column < columns; column += kStep)
            write(load_vector<kVector>(x + column), column);
    });
}

template <typename T, int kWarps, int kVector>
__global__ void __launch_bounds__(kNormThreads, 2) rms_norm_dx_kernel(const RmsNormCall call) {
    PEFTCORE_SHARED(float, shared, [kNormWarps]);
    constexpr int64_t kStep = 32 * kWarps * kVector;
    const int64_t columns = call.columns;
    for_rows<kWarps, kVector>(call.rows, [&](int64_t row, int64_t first) {
        const T* x = static_cast<const T*>(call.x) + row * columns;
        const T* dy = static_cast<const T*>(call.dy) + row * columns;
        T* dx = static_cast<T*>(call.dx) + row * columns;
        const float r = call.scale[row];
        Vector<T, kVector> held_x[kHeld] = {}, held_dy[kHeld] = {};
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (first + i * kStep >= columns) break;
            held_x[i] = load_vector<kVector>(x + first + i * kStep);
            held_dy[i] = load_vector<kVector>(dy + first + i * kStep);
        }
        float products = 0;
        const auto add = [&](const Vector<T, kVector>& of_x, const Vector<T, kVector>& of_dy,
                             int64_t column) {
            float g[kVector];
            load_gain(call, column, g);
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                products += to_float(of_dy.item[j]) * g[j] * (to_float(of_x.item[j]) * r);
        };
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (first + i * kStep < columns) add(held_x[i], held_dy[i], first + i * kStep);
        for (int64_t column = first + kHeld * kStep; column < columns; column += kStep)
            add(load_vector<kVector>(x + column), load_vector<kVector>(dy + column), column);
        const float mean = sum_of_row<kWarps>(products, shared) / float(columns);

        const auto write = [&](const Vector<T, kVector>& of_x, const Vector<T, kVector>& of_dy,
                               int64_t column) {
            float g[kVector];
            load_gain(call, column, g);
            Vector<T, kVector> result;
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                result.item[j] =
                    from_float<T>(r * (to_float(of_dy.item[j]) * g[j] - to_float(of_x.item[j]) * r * mean));
            store_vector(dx + column, result);
        };
#pragma unroll
        for (int i = 0; i < kHeld; ++i)
            if (first + i * kStep < columns) write(held_x[i], held_dy[i], first + i * kStep);
        for (int64_t column = first + kHeld * kStep; column < columns; column += kStep)
            write(load_vector<kVector>(x + column), load_vector<kVector>(dy + column), column);
    });
}

// Blocks of threads by columns (x) and by groups of rows (y).
template <typename T, int kVector>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_dweight_kernel(const RmsNormCall call, int64_t rows_of_group) {
    PEFTCORE_SHARED(float, shared, [kNormWarps][32 * kVector]);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t columns = call.columns, begin = int64_t(blockIdx.x) * 32 * kVector;
    const int64_t column = begin + lane * kVector, first = int64_t(blockIdx.y) * rows_of_group;
    const int64_t last = least(first + rows_of_group, call.rows);
    float sum[kVector] = {};
    if (column < columns) {
#pragma unroll 4
        for (int64_t row = first + warp; row < last; row += kNormWarps) {
            const int64_t at = row * columns + column;
            const Vector<T, kVector> x = load_vector<kVector>(static_cast<const T*>(call.x) + at);
            const Vector<T, kVector> dy = load_vector<kVector>(static_cast<const T*>(call.dy) + at);
            const float r = call.scale[row];
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                float normed = to_float(x.item[j]) * r;
                if (call.rounded) normed = to_float(from_float<T>(normed));
                sum[j] += to_float(dy.item[j]) * normed;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) shared[warp][lane * kVector + j] = sum[j];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * kVector && begin + i < columns; i += kNormThreads) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < kNormWarps; ++w) total += shared[w][i];
        call.sums[blockIdx.y * columns + begin + i] = total;
    }
}

int64_t rows_of_group(int64_t rows) { return filled_up(ceil_div(rows, kMostGroups), kRowsOfGroup); }

// body(a tag of the dtype, the number of warps of a row, the number of values of a vector).
template <typename Body>
const char* dispatch_rows(const RmsNormCall& call, const Body& body) {
    return dispatch_dtype(call.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        constexpr int kWidest = 16 / sizeof(T);
        const bool vectors = call.columns % kWidest == 0 && is_aligned(call.x) && is_aligned(call.weight) &&
                             is_aligned(call.y) && is_aligned(call.dy) && is_aligned(call.dx);
        return dispatch_flag(vectors, [&](auto whole) {
            constexpr int kVector = decltype(whole)::value ? kWidest : 1;
            return dispatch_flag(call.columns <= 32 * kHeld * kVector, [&](auto small) {
                return body(type, std::integral_constant<int, decltype(small)::value ? 1 : kNormWarps>(),
                            std::integral_constant<int, kVector>());
            });
        });
    });
}

unsigned blocks_of(const RmsNormCall& call, int warps) {
    return unsigned(least(ceil_div(call.rows * warps, kNormWarps), cuda_tuning().loop_blocks));
}

}  // namespace
}  // namespace norms
}  // namespace peftcore

extern "C" const char* peftcore_rms_norm(const peftcore::norms::RmsNormCall* call, void* stream) {
    using namespace peftcore::norms;
    if (call->rows == 0) return nullptr;
    return dispatch_rows(*call, [&](auto type, auto warps, auto vector) {
        constexpr int kWarps = decltype(warps)::value, kVector = decltype(vector)::value;
        using T = typename decltype(type)::type;
        return PEFTCORE_LAUNCH((rms_norm_kernel<T, kWarps, kVector>), blocks_of(*call, kWarps), kNormThreads,
                               0, stream, *call);
    });
}

extern "C" const char* peftcore_rms_norm_dx(const peftcore::norms::RmsNormCall* call, void* stream) {
    using namespace peftcore::norms;
    if (call->rows == 0) return nullptr;
    return dispatch_rows(*call, [&](auto type, auto warps, auto vector) {
        constexpr int kWarps = decltype(warps)::value, kVector = decltype(vector)::value;
        using T = typename decltype(type)::type;
        return PEFTCORE_LAUNCH((rms_norm_dx_kernel<T, kWarps, kVector>), blocks_of(*call, kWarps),
                               kNormThreads, 0, stream, *call);
    });
}

extern "C" int64_t peftcore_rms_norm_groups(int64_t rows) {
    using namespace peftcore::norms;
    return rows == 0 ? 0 : peftcore::ceil_div(rows, rows_of_group(rows));
}

extern "C" const char* peftcore_rms_norm_dweight(const peftcore::norms::RmsNormCall* call, void* stream) {
    using namespace peftcore::norms;
    if (call->rows == 0 || call->columns == 0) return nullptr;
    return dispatch_rows(*call, [&](auto type, auto, auto vector) {
        constexpr int kVector = decltype(vector)::value;
        using T = typename decltype(type)::type;
        const peftcore::Grid grid(peftcore::ceil_div(call->columns, 32 * kVector),
                                  peftcore_rms_norm_groups(call->rows));
        return PEFTCORE_LAUNCH((rms_norm_dweight_kernel<T, kVector>), grid, kNormThreads, 0, stream, *call,
                               rows_of_group(call->rows));
    });
}
