// y [rows, columns] = x [rows, inner] B [inner, columns] + bias in 16 bits, with fp32 sums, rounded once.
//
// B is unpacked into the L2 cache one panel at a time, so a 4-bit weight is never written to memory in 16 bits, nor a
// 16-bit weight in 32 bits.
//
// A panel consists of 32-bit words. On processors with bf16 dot products a word is a pair of bf16 values, consecutive along
// the inner dimension; elsewhere it is one fp32 value, and x is widened too.
//
// Sums run over the inner dimension in the same order for any number of threads and any cache sizes.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/half.h"

namespace peftcore {
namespace gemm {

constexpr int kTileColumns = 32;  // two registers

// Rows of memory, of `bytes` each, which begin `stride` bytes apart.
struct Region {
    const char* first = nullptr;
    int64_t rows = 0, bytes = 0, stride = 0;
};

// B, tile by tile. The first value of a pair is in the low half of its word.
struct Tiles {
    const void* source = nullptr;
    // Word p of tile i, inner numbers first + 2 p and first + 2 p + 1 of pairs, or first + p, at
    //   out + i * stride + p * kTileColumns
    // A pair's second half is zero behind an odd `last`. Columns behind the last one may hold anything.
    void (*unpack)(const void* source, int64_t column, int tiles, int64_t first, int64_t last, int64_t stride,
                   uint32_t* out) = nullptr;
    bool even_odd = false;  // a tile's columns come as 0, 2, .. 30, 1, 3, .. 31; otherwise in order

    // The memory that `unpack` reads for these arguments, without scales.
    Region (*region)(const void* source, int64_t column, int tiles, int64_t first, int64_t last) = nullptr;

    Tiles bind(const void* matrix) const { return {matrix, unpack, even_odd, region}; }
};

// Mask of a matrix: bit k % 8 of byte k / 8 of a row keeps column k. Rows are read in words of 32 bits.
struct Mask {
    const uint8_t* bits = nullptr;  // none: all
    int64_t stride = 0;             // bytes from a row to the next

    const uint8_t* row(int64_t m) const { return bits == nullptr ? nullptr : bits + m * stride; }
};

// keep ∘ (left right), which joins the sums of a product.
struct Addend {
    const void* left = nullptr;  // [rows, inner], bf16 for words that are pairs, else fp32; or nullptr
    Tiles right{};               // in the order of the product's `right`
    int64_t inner = 0;
    Mask keep;
    // Both factors are [first, rest], each as long and a multiple of kHalfMultiple: what is added is
    //   first first + rest first + first rest
    bool halves = false;
};
constexpr int64_t kHalfMultiple = 32;

struct Product {
    const void* x;
    Dtype dtype = Dtype::kBFloat16;  // of x, bias and y; bf16 for words that are pairs
    Tiles right;
    int64_t rows, inner, columns;
    const void* bias = nullptr;
    void* y;
    Addend addend{};
    // The right operand of the product that probably comes next, of the same kind and size as `right`, or nullptr: its
    // first panel is prefetched during the last panel of this product.
    const void* following = nullptr;
    // If the product is one term of a longer sum: the fp32 sums to which it is added; y is then not written. Stored panel
    // by panel, `sum_rows` rows of a panel's columns each, in the column order of the tiles. Only for kernels whose sums
    // are `by_rows`. This keeps the inner dimension of each product small enough for the caches.
    float* sums = nullptr;
    int64_t sum_rows = 0;

    int64_t word_values = 2;  // inner numbers of a word; `multiply` takes them from the kernel

    int64_t words() const { return (inner + word_values - 1) / word_values; }
};

struct Kernel;

// Number of fp32 values of `Product::sums`.
int64_t sums_size(const Kernel& kernel, int64_t rows, int64_t columns);
// Multiplies a row of the sums by `factor`.
void scale_sums(const Kernel& kernel, const Product& product, int64_t row, float factor);
// Copies a row of the sums, in the order of the columns.
void read_sums(const Kernel& kernel, const Product& product, int64_t row, float* out);

void multiply(const Kernel& kernel, const Product& product);

}  // namespace gemm
}  // namespace peftcore
