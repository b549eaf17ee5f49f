// The loops of a product, shared by all levels: over panels of B's columns, chunks of the inner dimension, and blocks
// of x's rows.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstring>

#include "common/caches.h"
#include "gemm/cpu/kernels.h"

namespace peftcore {
namespace gemm {
namespace {

// Tiles of B in a chunk, and all of the addend's, unpacked.
struct Panel {
    const uint32_t *right, *addend_right;
    int64_t tile, tiles;
    int64_t chunk, words, addend_words;  // chunk: its first word
    bool first, last;                    // of the chunks
};

// Memory of the next panel, prefetched line by line while this one is multiplied. With few rows of x, reading B takes
// as long as a fifth of the products (64 rows, 768 x 1024 on Zen 4), and no processor predicts where the next panel is.
class Ahead {
 public:
    explicit Ahead(const Region& region) : region_(region) { begin_row(); }

    inline void next() {
        if (region_.rows <= 0) return;
        __builtin_prefetch(at_, 0, 2);
        at_ += kLine;
        if (at_ < region_.first + region_.bytes) return;
        --region_.rows;
        region_.first += region_.stride;
        begin_row();
    }

 private:
    static constexpr int64_t kLine = 64;

    void begin_row() { at_ = region_.first - reinterpret_cast<uintptr_t>(region_.first) % kLine; }

    Region region_;
    const char* at_;
};

// Number of last blocks of rows during which it is fetched: earlier, it would be evicted from the cache again.
constexpr int64_t kAheadBlocks = 8;

// Rows of x that are multiplied by a panel, and those that follow them.
struct Block {
    int64_t row, rows;
    int64_t next;  // row
    float* sums;   // from chunk to chunk, kTiles * kTileColumns a row
    Ahead* ahead;  // prefetched meanwhile; or nullptr
};

template <typename Level>
concept BlockKernel = requires(Level level, const Product& product, const Arranged& arranged,
                               const Panel& panel, const Block& block, int64_t n, uint32_t* out) {
    { Level::kRows } -> std::convertible_to<int64_t>;        // of a block
    { Level::kTiles } -> std::convertible_to<int64_t>;       // of a panel
    { Level::kMultiple } -> std::convertible_to<int64_t>;    // see Kernel
    { Level::kWords } -> std::convertible_to<int64_t>;       // of a chunk at most: more gained nothing
    { Level::kWordValues } -> std::convertible_to<int64_t>;  // see Kernel
    { Level::kTakesAddend } -> std::convertible_to<bool>;
    // Words in a chunk, for so many in all, where a panel of so many words fits in the cache.
    { Level::chunk(n, n) } -> std::same_as<int64_t>;
    { Level::rows_in_place(product) } -> std::same_as<int64_t>;  // see Kernel
    // x's block from row n on of n rows, words from n on, n of them; filled up with zeros to kMultiple.
    Level::arrange_block(product, n, n, n, n, out);
    Level(product, arranged);
    // Adds the products to the block's sums, or with the last chunk stores them in y.
    level.multiply(panel, block);
    level.finish();
};

// Words that a chunk of several is a multiple of: weights in 4 bits are unpacked by blocks of 64 values.
constexpr int64_t kChunkMultiple = 32;

// A panel takes half of the L2 cache, within the most words that a chunk may have.
template <BlockKernel Level>
int64_t chunk_of(int64_t words) {
    constexpr int64_t kWordBytes = Level::kTiles * kTileColumns * sizeof(uint32_t);
    const int64_t fit = caches().second / 2 / kWordBytes / kChunkMultiple * kChunkMultiple;
    return std::min(words, Level::chunk(words, std::clamp<int64_t>(fit, 64, Level::kWords)));
}

template <BlockKernel Level>
void arrange(const Product& product, int64_t chunk, Range rows, uint32_t* out) {
    const int64_t all = filled_up(product.words(), Level::kMultiple);
    const int64_t all_rows = filled_up(product.rows, Level::kMultiple);
    for (int64_t first = 0; first < all; first += chunk) {
        const int64_t words = least(chunk, all - first);
        for (int64_t row = rows.first; row < rows.last; row += Level::kRows)
            Level::arrange_block(product, row, least(Level::kRows, rows.last - row), first, words,
                                 out + first * all_rows + row * words);
    }
}

// Missing values of the last words are zero.
inline void unpack(const Product& product, int64_t tile, int64_t tiles, int64_t first, int64_t words,
                   uint32_t* panel) {
    const int64_t stride = words * kTileColumns, missing = first + words - product.words();
    const int64_t values = product.word_values;
    product.right.unpack(product.right.source, tile * kTileColumns, int(tiles), values * first,
                         least(values * (first + words), product.inner), stride, panel);
    for (int64_t i = 0; missing > 0 && i < tiles; ++i)
        std::memset(panel + (i + 1) * stride - missing * kTileColumns, 0,
                    size_t(missing * kTileColumns) * sizeof(uint32_t));
}

// Memory that a panel is unpacked from, if any.
inline Ahead ahead_of(const Product& product, const void* source, int64_t tile, int64_t tiles, int64_t first,
                      int64_t words) {
    if (tiles <= 0 || source == nullptr || product.right.region == nullptr) return Ahead({});
    const int64_t values = product.word_values;
    return Ahead(product.right.region(source, tile * kTileColumns, int(tiles), values * first,
                                      least(values * (first + words), product.inner)));
}

// Memory of the task's next panel, from `tile` on; after the product's last panel, that of the product that follows.
template <BlockKernel Level>
Ahead ahead_of_next(const Product& product, Range tiles, Range rows, int64_t tile, int64_t chunk) {
    if (tile < tiles.last)
        return ahead_of(product, product.right.source, tile, least(Level::kTiles, tiles.last - tile), 0,
                        chunk);
    if (tiles.last * kTileColumns < product.columns || rows.last < product.rows) return Ahead({});
    return ahead_of(product, product.following, 0, least(Level::kTiles, tiles.last), 0, chunk);
}

template <BlockKernel Level>
void multiply_panels(const Product& product, const Arranged& arranged, Range tiles, Range rows,
                     const Buffers& buffers) {
    const Product addend = addend_alone(product);
    const int64_t all = filled_up(product.words(), Level::kMultiple), chunk = chunk_of<Level>(all);
    const int64_t addend_words = filled_up(addend.words(), Level::kMultiple);
    constexpr int64_t kColumns = Level::kTiles * kTileColumns;
    const bool summed = product.sums != nullptr;
    Level level(product, arranged);
    for (int64_t tile = tiles.first; tile < tiles.last; tile += Level::kTiles) {
        const int64_t count = least(Level::kTiles, tiles.last - tile);
        if (addend_words != 0) unpack(addend, tile, count, 0, addend_words, buffers.addend_panel);
        float* sums = summed
                          ? product.sums + (tile / Level::kTiles * product.sum_rows + rows.first) * kColumns
                          : buffers.sums;
        for (int64_t first = 0; first < all; first += chunk) {
            const int64_t words = least(chunk, all - first);
            const bool ends = first + words == all;
            unpack(product, tile, count, first, words, buffers.panel);
            const Panel panel{.right = buffers.panel,
                              .addend_right = buffers.addend_panel,
                              .tile = tile,
                              .tiles = count,
                              .chunk = first,
                              .words = words,
                              .addend_words = addend_words,
                              .first = first == 0 && !summed,
                              .last = ends && !summed};
            Ahead ahead = ends ? ahead_of_next<Level>(product, tiles, rows, tile + Level::kTiles, chunk)
                               : ahead_of(product, product.right.source, tile, count, first + chunk,
                                          least(chunk, all - first - chunk));
            for (int64_t row = rows.first; row < rows.last; row += Level::kRows)
                level.multiply(panel,
                               {.row = row,
                                .rows = least(Level::kRows, rows.last - row),
                                .next = row + Level::kRows < rows.last ? row + Level::kRows : row,
                                .sums = sums + (row - rows.first) * kColumns,
                                .ahead = rows.last - row <= kAheadBlocks * Level::kRows ? &ahead : nullptr});
        }
    }
    level.finish();
}

template <BlockKernel Level>
Kernel kernel_of() {
    return {.rows = Level::kRows,
            .tiles = Level::kTiles,
            .multiple = Level::kMultiple,
            .word_values = Level::kWordValues,
            .takes_addend = Level::kTakesAddend,
            .chunk = chunk_of<Level>,
            .rows_in_place = Level::rows_in_place,
            .arrange = arrange<Level>,
            .multiply = multiply_panels<Level>};
}

}  // namespace
}  // namespace gemm
}  // namespace peftcore
