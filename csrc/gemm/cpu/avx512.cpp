// 12 rows of x by 32 columns of B in registers: 24 of 32 hold sums. B is read as at AVX2.
#include "common/avx512.h"

#include "gemm/cpu/fp32.h"

namespace peftcore {
namespace gemm {
namespace {

struct Avx512Lanes {
    using Floats = __m512;
    static constexpr int64_t kRows = 12, kLanes = 16;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static Floats all(const float* from) { return _mm512_set1_ps(*from); }
    static void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats keep(Floats values, uint32_t bits) { return _mm512_maskz_mov_ps(__mmask16(bits), values); }
    static void round(Floats values, Dtype dtype, void* out) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm256_storeu_si256(static_cast<__m256i*>(out),
                            dtype == Dtype::kHalf ? _mm512_cvtps_ph(values, kNearest) : to_bf16(values));
    }
};

}  // namespace

void fill_avx512(ManyRows (&products)[kDtypes]) {
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kHalf, Dtype::kBFloat16}) {
        Kernel& kernel = products[int(dtype)].kernel;
        kernel = kernel_of<WideProducts<Avx512Lanes>>();
        kernel.by_rows = true;
    }
}

}  // namespace gemm
}  // namespace peftcore
