// Rows of W in 16 bits, widened to fp32 as they are read.
#include "common/avx2.h"

#include "common/workspace.h"
#include "gemm/cpu/skinny/kernels.h"

namespace peftcore {
namespace gemm {
namespace {

constexpr int kInputs = 4;  // most rows of x

// Rows [n, n + kCount) of W by kBatch rows of x, which are fp32.
template <typename T, int kCount, int kBatch>
void multiply(const SkinnyProduct& args, const float* x, int64_t n) {
    const int64_t inner = args.inner, whole = inner / 8 * 8;
    const T* w = static_cast<const T*>(args.w) + n * inner;
    __m256 sums[kCount][kBatch];
    for (auto& row : sums)
        for (__m256& sum : row) sum = _mm256_setzero_ps();
    // Prefetches the next rows: reading several rows at once is too many streams for the processor's prefetcher.
    const char* ahead = reinterpret_cast<const char*>(w + kCount * inner);
    for (int64_t k = 0; k < whole; k += 8, ahead += kCount * 8 * sizeof(T)) {
        _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) {
            const __m256 values = load8(w + r * inner + k);
#pragma GCC unroll 4
            for (int i = 0; i < kBatch; ++i)
                sums[r][i] = _mm256_fmadd_ps(values, _mm256_loadu_ps(x + i * inner + k), sums[r][i]);
        }
    }
    for (int i = 0; i < kBatch; ++i)
        for (int r = 0; r < kCount; ++r) {
            float sum = sum8(sums[r][i]);
            for (int64_t k = whole; k < inner; ++k) sum += to_float(w[r * inner + k]) * x[i * inner + k];
            if (args.bias != nullptr) sum += to_float(static_cast<const T*>(args.bias)[n + r]);
            static_cast<T*>(args.y)[i * args.columns + n + r] = from_float<T>(sum);
        }
}

template <typename T, int kBatch>
void multiply_all(const SkinnyProduct& args, const float* x, Range columns) {
    constexpr int kRows = kBatch == 1 ? 4 : 2;  // of W, whose sums fit in registers
    int64_t n = columns.first;
    for (; n + kRows <= columns.last; n += kRows) multiply<T, kRows, kBatch>(args, x, n);
    for (; n < columns.last; ++n) multiply<T, 1, kBatch>(args, x, n);
}

template <typename T>
void run(const SkinnyProduct& args, Range columns) {
    const int64_t count = args.batch * args.inner;
    float* x = static_cast<float*>(workspace(count * int64_t(sizeof(float))));
    for (int64_t i = 0; i < count; ++i) x[i] = to_float(static_cast<const T*>(args.x)[i]);
    switch (args.batch) {
        case 1:
            return multiply_all<T, 1>(args, x, columns);
        case 2:
            return multiply_all<T, 2>(args, x, columns);
        case 3:
            return multiply_all<T, 3>(args, x, columns);
        default:
            return multiply_all<T, kInputs>(args, x, columns);
    }
}

}  // namespace

void fill_avx2(SkinnyKernel (&kernels)[kDtypes]) {
    kernels[int(Dtype::kHalf)] = {.max_batch = kInputs, .run = run<Half>};
    kernels[int(Dtype::kBFloat16)] = {.max_batch = kInputs, .run = run<BFloat16>};
}

}  // namespace gemm
}  // namespace peftcore
