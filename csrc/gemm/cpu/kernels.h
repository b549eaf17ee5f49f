// What the SIMD levels supply to `multiply`.
#pragma once

#include "gemm/cpu/product.h"

namespace peftcore {
namespace gemm {

// What `multiply_tiles` has for itself.
struct Buffers {
    uint32_t* panel;         // tiles * min(pairs, all pairs) * kTileColumns words
    uint32_t* addend_panel;  // the same of the addend's pairs, all in one chunk
    float*
        sums;  // a panel's columns of these rows, filled up to whole blocks, if there is more than one chunk
};

struct Kernel {
    int64_t rows;           // of x in a block
    int64_t pairs;          // of inner numbers in a chunk
    int64_t tiles;          // of columns in a panel, which is a chunk of B
    int64_t row_multiple;   // rows and pairs of arranged x are filled up to a multiple with zeros
    int64_t pair_multiple;  // of `pairs` too

    bool takes_addend;

    // Whether x's whole blocks of rows are read where they lie.
    bool (*in_place)(const Product& product);
    // x's rows [first, last), `first` being a multiple of `rows`: by chunks, by blocks of rows, as the kernel
    // reads them.
    void (*arrange)(const Product& product, int64_t first, int64_t last, uint32_t* out);

    // Tiles of 32 columns [first_tile, last_tile) of rows [first_row, last_row); `first_row` is a multiple of
    // `rows`. `left` is the addend's, arranged too.
    void (*multiply_tiles)(const Product& product, const uint32_t* x, const uint32_t* left,
                           int64_t first_tile, int64_t last_tile, int64_t first_row, int64_t last_row,
                           const Buffers& buffers);
};

// The addend as a product of its own, to be arranged like one.
static inline Product addend_alone(const Product& product) {
    Product addend = product;
    addend.x = product.addend.left;
    addend.right = product.addend.right;
    addend.inner = product.addend.left == nullptr ? 0 : product.addend.inner;
    return addend;
}

Kernel avx512bf16_kernel();
Kernel amx_kernel();

}  // namespace gemm
}  // namespace peftcore
