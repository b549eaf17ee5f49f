// 6 rows of x by 16 columns of B in registers: 12 of 16 hold sums.
#include "gemm/cpu/dense/fp32.h"
#include "gemm/cpu/fp32.h"

namespace peftcore {
namespace gemm {
namespace {

struct Avx2Lanes {
    using Floats = __m256;
    static constexpr int64_t kRows = 6, kLanes = 8;

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static Floats all(const float* from) { return _mm256_broadcast_ss(from); }
    static void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats keep(Floats values, uint32_t bits) {
        const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits)), lane);
        return _mm256_and_ps(values, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
    }
    static void round(Floats values, Dtype dtype, void* out) {
        _mm_storeu_si128(static_cast<__m128i*>(out),
                         dtype == Dtype::kHalf ? round_to(values, static_cast<const Half*>(nullptr))
                                               : round_to(values, static_cast<const BFloat16*>(nullptr)));
    }
};

}  // namespace

void fill_avx2(ManyRows (&products)[kDtypes]) {
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kHalf, Dtype::kBFloat16}) {
        ManyRows& entry = products[int(dtype)];
        entry.kernel = kernel_of<WideProducts<Avx2Lanes>>();
        entry.kernel.by_rows = true;
        entry.factor = reader_of<float>();
        entry.beats_library = true;
    }
    products[int(Dtype::kHalf)].dense = reader_of<Half>();
    products[int(Dtype::kBFloat16)].dense = reader_of<BFloat16>();
    ManyRows& entry = products[int(Dtype::kFloat)];
    entry.dense = reader_of<float>();
    entry.least_rows = kLeastFloatRows;
}

}  // namespace gemm
}  // namespace peftcore
