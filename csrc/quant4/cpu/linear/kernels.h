// y = x Wᵀ + b for few rows of x, directly from 4 bits: the kernels of each SIMD level.
//
// There are four kinds of kernels:
//   rows      reads a row of W at a time, 8 values (one 32-bit word) per lane. Bits 4 j of the word are the codebook index
//             of the lane's j-th value; x is stored in that order, and a lane has one scale. Products and sums are fp32.
//   dots      the same with bf16 dot products. Scales are applied in fp32, once per block, so that only codebook entries
//             are rounded (rounded.h).
//   integers  multiplies both as 16-bit integers, for x of 16 bits: the fastest kind on processors without bf16
//             (integers.h).
//   tile      converts many rows of W to bf16, rounded as for dots, for more rows of x. With AMX the tile is a register,
//             and the product of entry and scale is rounded.
//
// A zero point (affine codes) contributes -(zero point - kCentre) * scale * the block's sum of x. zeros.h computes this in
// fp32 as an addend of each result. The AVX-512 bf16 kernels add it to their sums themselves, and the AMX tile subtracts
// zero points when it unpacks.
//
// Plain C++ has none of these kernels: for 4096 x 4096, looking values up one by one took 17 to 20 ms, dequantizing slabs
// 10 ms.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>

#include "quant4/format.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {

struct LinearCall {
    WeightView weight;
    int64_t batch;     // rows of x
    const void* x;     // as the kernel's `arrange` made it
    const void* bias;  // of `dtype`, or nullptr
    void* y;           // [batch, weight.rows] of `dtype`
    Dtype dtype;
    const float* addend = nullptr;  // [batch, weight.rows], or nullptr
    const float* sums = nullptr;    // of x over blocks, as `ZeroPoints` makes them, or nullptr
};

// What a kernel needs from the caller if the weight has zero points.
enum class ZeroInput { kAddend, kSums, kNothing };

struct LinearKernel {
    int64_t granule = 1;              // rows of W that one call computes together
    int64_t min_batch = 1;            // rows of x from which it is faster than the other way
    int64_t max_batch[kDtypes] = {};  // rows of x up to which it is faster than slabs, by Dtype
    int column_multiple = 1;          // of the columns
    int min_shift = 5;                // log2 of the smallest block
    ZeroInput zero_input = ZeroInput::kAddend;
    int64_t (*arranged_bytes)(int64_t batch, int64_t columns) = nullptr;
    // False if the kernel does not take these values.
    bool (*arrange)(const void* x, Dtype dtype, int64_t batch, int64_t columns, void* out) = nullptr;
    void (*run)(const LinearCall&, int64_t first_row, int64_t last_row) = nullptr;
};

// Sums of a row of x, one for each block and zeros up to whole vectors.
static inline int64_t sums_stride(int64_t blocks) { return filled_up(blocks, 16); }

struct ZeroPoints {
    // Sums of x over each 1 << shift columns, [batch][sums_stride(columns >> shift)].
    void (*sum_blocks)(const void* x, Dtype dtype, int64_t batch, int64_t columns, int shift,
                       float* out) = nullptr;
    // Columns [first, last) of the addend, [batch][weight.rows].
    void (*addend)(const WeightView& weight, const float* sums, int64_t batch, int64_t first, int64_t last,
                   float* out) = nullptr;
};

// Any kernel may be missing; it is then used for no number of rows.
struct LinearKernels {
    LinearKernel rows, integers, dots, tile;
    LinearKernel small_integers;  // for blocks of 16, where a level arranges x otherwise for them
    ZeroPoints zeros;
};

// Most rows of x for "tile", in bf16 only: with more, gemm::multiply is as fast.
constexpr int64_t kTileBatch = 32;

void fill_avx2(LinearKernels&);
void fill_avx512(LinearKernels&);
void fill_avx512bf16(LinearKernels&);
void fill_amx(LinearKernels&);
void fill_neon(LinearKernels&);
void fill_neonbf16(LinearKernels&);

// The scales of W's elements [begin, end), one for each block that they touch, followed by 16 zeros.
static inline void copy_scales(const WeightView& weight, int64_t begin, int64_t end, float* out) {
    const int64_t first = begin >> weight.shift, last = ((end - 1) >> weight.shift) + 1;
    block_scales(weight, first, last, out);
    for (int i = 0; i < 16; ++i) out[last - first + i] = 0;
}

static inline float load_as_float(const void* from, Dtype dtype, int64_t i) {
    switch (dtype) {
        case Dtype::kHalf:
            return to_float(static_cast<const Half*>(from)[i]);
        case Dtype::kBFloat16:
            return to_float(static_cast<const BFloat16*>(from)[i]);
        default:
            return static_cast<const float*>(from)[i];
    }
}

// Returns T(code) from a per-thread cache, since a model has few codebooks. `T::of` is the code that a T was made of. The
// result is valid until kKept - 1 others have been made.
template <typename T>
static const T& made_of_code(const float* code) {
    constexpr int kKept = 4;
    thread_local std::optional<T> cache[kKept];
    thread_local int oldest = 0;
    for (const std::optional<T>& entry : cache)
        if (entry && std::memcmp(entry->of, code, sizeof entry->of) == 0) return *entry;
    T& added = cache[oldest].emplace(code);
    oldest = (oldest + 1) % kKept;
    return added;
}

// The only rounding of a result.
static inline void store_result(const LinearCall& args, int64_t m, int64_t n, float sum) {
    const int64_t i = m * args.weight.rows + n;
    if (args.addend != nullptr) sum += args.addend[i];
    const float value = args.bias == nullptr ? sum : sum + load_as_float(args.bias, args.dtype, n);
    switch (args.dtype) {
        case Dtype::kHalf:
            static_cast<Half*>(args.y)[i] = from_float<Half>(value);
            break;
        case Dtype::kBFloat16:
            static_cast<BFloat16*>(args.y)[i] = from_float<BFloat16>(value);
            break;
        default:
            static_cast<float*>(args.y)[i] = value;
    }
}

}  // namespace quant4
}  // namespace peftcore
