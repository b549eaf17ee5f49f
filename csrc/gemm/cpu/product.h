// y [rows, columns] = x [rows, inner] B [inner, columns] + bias in 16 bits, with fp32 sums, rounded once.
//
// B is not in memory as such: it is unpacked into the second cache, a panel at a time, from whatever holds it.
// So a 4-bit weight costs no trip through memory as 16 bits, and a 16-bit one none as 32 bits.
//
// A panel consists of 32-bit words. Where the processor has dot products of bf16 a word is a pair of bf16 values that
// follow one another on the inner dimension; elsewhere it is one fp32 value, and x is widened as well.
//
// A sum runs over the inner numbers in their order, whatever the number of threads and the size of caches.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/half.h"

namespace peftcore {
namespace gemm {

constexpr int kTileColumns = 32;  // two registers

// Rows of memory, so many bytes each, which begin `stride` apart.
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

    // What `unpack` of the same arguments reads, but for scales.
    Region (*region)(const void* source, int64_t column, int tiles, int64_t first, int64_t last) = nullptr;

    Tiles of(const void* matrix) const { return {matrix, unpack, even_odd, region}; }
};

// Which numbers of a matrix count: for column k bit k % 8 of byte k / 8 of its row. A row is read by 32 bits.
struct Mask {
    const uint8_t* bits = nullptr;  // none: all
    int64_t stride = 0;             // bytes from a row to the next

    const uint8_t* row(int64_t m) const { return bits == nullptr ? nullptr : bits + m * stride; }
};

// keep ∘ (left right), which joins the sums of a product.
struct Addend {
    const void* left = nullptr;  // [rows, inner], bf16 for words that are pairs, else fp32; or nullptr
    Tiles right{};               // in the order of the product's own
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
    // A source like `right`'s, of a product of these sizes that is likely to come next: where its first panel lies is
    // fetched during the last one. Or nullptr.
    const void* following = nullptr;

    int64_t word_values = 2;  // inner numbers of a word; `multiply` takes them from the kernel

    int64_t words() const { return (inner + word_values - 1) / word_values; }
};

struct Kernel;

void multiply(const Kernel& kernel, const Product& product);

}  // namespace gemm
}  // namespace peftcore
