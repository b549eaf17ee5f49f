// Launchers of the LoRA CUDA kernels. Pointers are device memory unless said otherwise, `stream` a
// cudaStream_t, dtypes peftcore::Dtype; matrices are contiguous. Factors and thin matrices are fp32: in
// fp16 a T of small gradients would vanish. They return nullptr, or why the launch failed. Arguments are
// checked by the caller (lora/arguments.h). `threshold`, `key0`, `key1`: lora/lora.h.
#pragma once

#include <cstdint>

extern "C" {

// s [samples * rows, stride] = scale_i (keep ∘ x) factor_iᵀ, x [samples * rows, columns] of 16 bits.
// `factors` [rank_i, columns], `ranks` (at most `stride`) and `scales` are host
// arrays of `adapters` entries; i is index[sample], or 0 where `index` is nullptr. Samples of another i get
// no s. `partial`: peftcore_lora_down_workspace floats.
const char* peftcore_lora_down(const void* x, int dtype, int64_t samples, int64_t rows, int64_t columns,
                               const float* const* factors, const int* ranks, const float* scales,
                               int adapters, const int64_t* index, int stride, uint32_t threshold,
                               uint32_t key0, uint32_t key1, float* partial, float* s, void* stream);
int64_t peftcore_lora_down_workspace(int64_t rows, int64_t columns, int rank);

// out [samples * rows, columns] = keep ∘ (bias + thin factor_iᵀ), without bias where that is nullptr, or
// added to it where `add`; thin [samples * rows, stride], out and bias [columns] of `dtype`, of 16 bits,
// `factors` [columns, rank_i]; the rest as above. i = -1 adds nothing; any other i without an adapter makes
// its rows NaN.
const char* peftcore_lora_up(const float* thin, int dtype, int64_t samples, int64_t rows, int64_t columns,
                             const float* const* factors, const int* ranks, int adapters,
                             const int64_t* index, int stride, uint32_t threshold, uint32_t key0,
                             uint32_t key1, const void* bias, bool add, void* out, void* stream);

// out = (keep ∘ wide)ᵀ thin, [columns, rank] or transposed [rank, columns], of `out_dtype`; wide [rows,
// columns] of 16 bits, thin [rows, rank]. `partial`: peftcore_lora_reduce_workspace floats.
const char* peftcore_lora_reduce(const void* wide, const float* thin, int dtype, int64_t rows,
                                 int64_t columns, int rank, uint32_t threshold, uint32_t key0, uint32_t key1,
                                 float* partial, void* out, int out_dtype, bool transposed, void* stream);
int64_t peftcore_lora_reduce_workspace(int64_t rows, int64_t columns, int rank);

// In one pass over wide: out [columns, rank] as above, without dropout, and product [rows, rank] =
// scale wide factorᵀ; factor [rank, columns]. rank <= kOnePassMaxRank. `partial`:
// peftcore_lora_reduce_workspace floats; `product_partial`: peftcore_lora_product_workspace.
const char* peftcore_lora_reduce_and_product(const void* wide, const float* thin, const float* factor,
                                             int dtype, int64_t rows, int64_t columns, int rank, float scale,
                                             float* partial, float* product_partial, void* out, int out_dtype,
                                             float* product, void* stream);
int64_t peftcore_lora_product_workspace(int64_t rows, int64_t columns, int rank);

// out = keep ∘ x, [rows, columns]; out may be x.
const char* peftcore_lora_drop(const void* x, int dtype, int64_t rows, int64_t columns, uint32_t threshold,
                               uint32_t key0, uint32_t key1, void* out, void* stream);

// out[i] = scale (partial[0][i] + partial[1][i] + ...), in this order, rounded once.
const char* peftcore_lora_sum(const float* partial, int64_t parts, int64_t count, float scale, void* out,
                              int dtype, void* stream);
}

namespace peftcore {
namespace lora {

// Partial products of the one pass weigh rank / 32 of a pass over wide: beyond, a second pass costs less.
constexpr int kOnePassMaxRank = 16;

}  // namespace lora
}  // namespace peftcore
