// Kernels that the SIMD levels supply to `multiply`.
#pragma once

#include <optional>

#include "common/integers.h"
#include "gemm/cpu/product.h"
#include "weight/view.h"

namespace peftcore {
namespace gemm {

// x and the addend's left factor as a kernel reads them.
struct Arranged {
    const uint32_t *x, *addend_left;
};

// Buffers of one task.
struct Buffers {
    uint32_t* panel;         // tiles * chunk * kTileColumns words
    uint32_t* addend_panel;  // the addend's words, all in one chunk
    float* sums;  // a panel's columns of the task's rows, filled up to whole blocks, if chunks are many
};

struct Kernel {
    int64_t rows = 0;         // of x in a block
    int64_t tiles = 0;        // of columns in a panel, which is a chunk of B
    int64_t multiple = 1;     // rows and words of arranged x are filled up to a multiple of it with zeros
    int64_t word_values = 2;  // inner numbers of a word: a pair of bf16, or one fp32
    bool takes_addend = false;
    bool by_rows = false;  // sums of a panel are rows of its columns, so that `Product::sums` can be read

    // Number of words in a chunk, for so many in all.
    int64_t (*chunk)(int64_t words) = nullptr;
    // Number of x's first rows that are read in place: all, or whole blocks.
    int64_t (*rows_in_place)(const Product& product) = nullptr;
    // x's rows, the first of which is a multiple of `rows`: by chunks, by blocks of rows, as `multiply` reads them.
    void (*arrange)(const Product& product, int64_t chunk, Range rows, uint32_t* out) = nullptr;
    // Tiles of kTileColumns columns, of rows the first of which is a multiple of `rows`. Without it there is
    // no kernel.
    void (*multiply)(const Product& product, const Arranged& arranged, Range tiles, Range rows,
                     const Buffers& buffers) = nullptr;
};

// Row `row` of x, bias and y of a product in bf16.
static inline const BFloat16* bf16_row(const Product& product, int64_t row) {
    return static_cast<const BFloat16*>(product.x) + row * product.inner;
}
static inline const BFloat16* bf16_bias(const Product& product) {
    return static_cast<const BFloat16*>(product.bias);
}
static inline BFloat16* bf16_result(const Product& product, int64_t row) {
    return static_cast<BFloat16*>(product.y) + row * product.columns;
}

// The addend as a separate product, to be arranged like one.
static inline Product addend_alone(const Product& product) {
    Product addend = product;
    if (product.word_values == 1) addend.dtype = Dtype::kFloat;
    addend.x = product.addend.left;
    addend.right = product.addend.right;
    addend.inner = product.addend.left == nullptr ? 0 : product.addend.inner;
    return addend;
}

// A WeightView as the right side of a product: Wᵀ for x Wᵀ, W for dy W. Tiles refer to the view.
struct Reader {
    Tiles transposed, plain;
    // Whether weights of this shape can be read; nullptr: all can.
    bool (*reads)(const WeightView& weight) = nullptr;
};
struct DenseReader : Reader {};   // of a dense weight
struct PackedReader : Reader {};  // of one in 4 bits

// Products of many rows of x of one dtype.
struct ManyRows {
    Kernel kernel;
    DenseReader dense;  // of x's dtype
    PackedReader packed;
    DenseReader factor;  // of an addend: bf16 where words are pairs, else fp32
    // Also faster than the BLAS library with dense weights, which has no 16-bit instructions to use on this machine.
    bool beats_library = false;
    // With fewer rows the library multiplies by dense weights.
    int64_t least_rows = 1;
};
constexpr int64_t kLeastFloatRows = 64;

// Returns W or Wᵀ as the kernel reads it; nullopt without a kernel, or a reader for such a weight. The result refers to
// the view.
static inline std::optional<Tiles> tiles_of(const ManyRows& products, const WeightView& weight,
                                            bool transposed) {
    const bool packed = weight.codes != nullptr;
    const Reader& reader = packed ? static_cast<const Reader&>(products.packed) : products.dense;
    const Tiles& tiles = transposed ? reader.transposed : reader.plain;
    if (products.kernel.multiply == nullptr || tiles.unpack == nullptr || weight.numel() == 0 ||
        (!packed && weight.dense == nullptr) || (reader.reads != nullptr && !reader.reads(weight)))
        return {};
    return tiles.bind(&weight);
}

// The kernel and its readers of dense weights, for all dtypes.
void fill_avx2(ManyRows (&)[kDtypes]);
void fill_avx512(ManyRows (&)[kDtypes]);
void fill_avx512bf16(Kernel&);
void fill_amx(Kernel&);
void fill_neonbf16(Kernel&);
void fill_avx512bf16(DenseReader&);
void fill_neonbf16(DenseReader&);

}  // namespace gemm
}  // namespace peftcore
