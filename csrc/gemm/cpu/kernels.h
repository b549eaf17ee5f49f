// What the SIMD levels supply to `multiply`.
#pragma once

#include "common/integers.h"
#include "gemm/cpu/product.h"
#include "weight/view.h"

namespace peftcore {
namespace gemm {

// x and the addend's left factor as a kernel reads them.
struct Arranged {
    const uint32_t *x, *addend_left;
};

// What a task has for itself.
struct Buffers {
    uint32_t* panel;         // tiles * chunk * kTileColumns words
    uint32_t* addend_panel;  // the same of the addend's pairs, all in one chunk
    float* sums;  // a panel's columns of the task's rows, filled up to whole blocks, if chunks are many
};

struct Kernel {
    int64_t rows = 0;      // of x in a block
    int64_t tiles = 0;     // of columns in a panel, which is a chunk of B
    int64_t multiple = 1;  // rows and pairs of arranged x are filled up to a multiple of it with zeros
    bool takes_addend = false;

    // How many pairs of inner numbers a chunk has, of so many in all.
    int64_t (*chunk)(int64_t pairs) = nullptr;
    // Whether x's whole blocks of rows are read where they lie.
    bool (*in_place)(const Product& product) = nullptr;
    // x's rows, the first of which is a multiple of `rows`: by chunks, by blocks of rows, as `multiply` reads them.
    void (*arrange)(const Product& product, int64_t chunk, Range rows, uint32_t* out) = nullptr;
    // Tiles of kTileColumns columns, of rows the first of which is a multiple of `rows`. Without it there is
    // no kernel.
    void (*multiply)(const Product& product, const Arranged& arranged, Range tiles, Range rows,
                     const Buffers& buffers) = nullptr;
};

// The addend as a product of its own, to be arranged like one.
static inline Product addend_alone(const Product& product) {
    Product addend = product;
    addend.x = product.addend.left;
    addend.right = product.addend.right;
    addend.inner = product.addend.left == nullptr ? 0 : product.addend.inner;
    return addend;
}

// A dense WeightView of bf16 as the right side of a product: Wᵀ for x Wᵀ, W for dy W. Tiles refer to the view.
struct DenseReader {
    Tiles transposed, plain;
};

void fill_avx512bf16(Kernel&);
void fill_amx(Kernel&);
void fill_neonbf16(Kernel&);
void fill_avx512bf16(DenseReader&);
void fill_neonbf16(DenseReader&);

}  // namespace gemm
}  // namespace peftcore
