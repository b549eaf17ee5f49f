// 32 rows of x by 32 columns of B in tile registers of 16 rows by 64 bytes, 16 pairs of inner numbers at a
// time: four tiles hold sums, two x, two B.
//
// B's columns are unpacked into a panel, which stays in the L2 cache and is multiplied by one block of x's rows after
// another. A piece of a block, which stays in L1, is multiplied by all tiles of the panel, which bypass L1. Meanwhile
// the sums of the previous tile are rounded and stored.
//
// Measured on two cores of Sapphire Rapids. 1024 rows, 576 x 1536, a tile's sums stored while the next one is
// multiplied: 0.51 ms instead of 0.69; B bypassing L1: 0.39. 4096 x 4096: pieces and chunks 0.84 of
// the time of whole rows; the library takes 1.1 times as long as all this. No better: prefetching y, dividing
// rows among threads instead of columns, panels of 12 or 16 tiles.
#include "common/amx.h"

#include "gemm/cpu/avx512.h"
#include "gemm/cpu/panels.h"

namespace peftcore {
namespace gemm {
namespace {

constexpr int64_t kBlockRows = 2 * kSide;
constexpr int64_t kPanelTiles = 8, kPanelColumns = kPanelTiles * kTileColumns;
constexpr int64_t kStepBytes = 2 * kTileWords * 4;  // of 16 pairs of a tile of B

// Number of a block's pairs that fit in three quarters of the L1 cache.
int64_t pairs_of_piece() { return caches().first / 4 * 3 / (kBlockRows * 4) / kSide * kSide; }

// 16 pairs of x's rows, in the layout that a tile takes.
struct Left {
    const char* first;
    int64_t row, step;  // bytes from a row to the next, and to the next 16 pairs
};

// Each step of a row is then a cache line, and those of 32 rows do not share a set of the L1 cache.
bool readable_in_place(const Product& product) {
    constexpr int64_t kSame = 4096 / 2;
    return product.inner % (2 * kSide) == 0 && product.inner % kSame != 0 &&
           reinterpret_cast<uintptr_t>(product.x) % 64 == 0;
}

Left left_of(const Product& product, const uint32_t* arranged, int64_t row, int64_t chunk, int64_t pairs) {
    if (readable_in_place(product) && product.rows - row >= kBlockRows)
        return {.first = reinterpret_cast<const char*>(bf16_row(product, row) + 2 * chunk),
                .row = 2 * product.inner,
                .step = kRowBytes};
    const int64_t rows = least(kBlockRows, filled_up(product.rows - row, kSide));
    return {.first = reinterpret_cast<const char*>(arranged + chunk * filled_up(product.rows, kSide) +
                                                   row * pairs),
            .row = kRowBytes,
            .step = rows * kRowBytes};
}

// Sums of up to 32 rows of a tile's columns go through tiles 0 to 3; kBoth: of more than 16. `meanwhile` is
// called at each step with its number.
template <bool kBoth, typename Meanwhile>
inline void accumulate(const Left& left, const uint32_t* right, int64_t pairs, const Meanwhile& meanwhile) {
    const char* x = left.first;
    const char* b = reinterpret_cast<const char*>(right);
    for (int64_t step = 0; step < pairs / kSide; ++step, x += left.step, b += kStepBytes) {
        _tile_stream_loadd(6, b, 2 * kRowBytes);
        _tile_loadd(4, x, left.row);
        _tile_stream_loadd(7, b + kRowBytes, 2 * kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        if (kBoth) _tile_loadd(5, x + kSide * left.row, left.row);
        _tile_dpbf16ps(1, 4, 7);
        if (kBoth) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        meanwhile(step);
    }
}

// Products of factors in halves (see Addend): a tile of each half is read once for the two products that use it.
template <bool kBoth>
inline void accumulate_halves(const Left& left, const uint32_t* right, int64_t pairs) {
    const int64_t steps = pairs / kSide / 2;
    const char *x = left.first, *x_rest = x + steps * left.step;
    const char *b = reinterpret_cast<const char*>(right), *b_rest = b + steps * kStepBytes;
    const auto load_left = [&](const char* from) {
        _tile_loadd(4, from, left.row);
        if (kBoth) _tile_loadd(5, from + kSide * left.row, left.row);
    };
    const auto load_right = [](const char* from) {
        _tile_stream_loadd(6, from, 2 * kRowBytes);
        _tile_stream_loadd(7, from + kRowBytes, 2 * kRowBytes);
    };
    const auto multiply = [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!kBoth) return;
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    };
    for (int64_t step = 0; step < steps; ++step) {
        load_right(b + step * kStepBytes);
        load_left(x_rest + step * left.step);
        multiply();
        load_left(x + step * left.step);
        multiply();
        load_right(b_rest + step * kStepBytes);
        multiply();
    }
}

inline void no_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Sums in memory, with rows `stride` values apart.
struct Sums {
    float* first;
    int64_t stride;
};

template <bool kBoth>
inline void load_sums(const Sums& sums) {
    const float* below = sums.first + kSide * sums.stride;
    _tile_loadd(0, sums.first, 4 * sums.stride);
    _tile_loadd(1, sums.first + kSide, 4 * sums.stride);
    if (!kBoth) return;
    _tile_loadd(2, below, 4 * sums.stride);
    _tile_loadd(3, below + kSide, 4 * sums.stride);
}

template <bool kBoth>
inline void store_sums(const Sums& sums) {
    float* below = sums.first + kSide * sums.stride;
    _tile_stored(0, sums.first, 4 * sums.stride);
    _tile_stored(1, sums.first + kSide, 4 * sums.stride);
    if (!kBoth) return;
    _tile_stored(2, below, 4 * sums.stride);
    _tile_stored(3, below + kSide, 4 * sums.stride);
}

// Operands of one tile; the addend has pairs in the last chunk only.
struct Work {
    Left left, addend_left, next;  // next: to be prefetched, from row ahead_row on
    const uint32_t *right, *addend_right;
    int64_t pairs, addend_pairs, ahead_row, ahead_rows;
    bool halves;  // of the addend
    Sums from, to;
    float* masked;
    bool first;  // the sums start at zero
};

// A tile's sums that are rounded and stored in y while the next tile is multiplied.
struct Pending {
    const Product& product;
    int64_t row = 0, column = 0;
    int64_t rows = 0, done = 0;
    Sums sums{};
    const float* masked = nullptr;  // the addend's, kTileColumns a row, if it is masked
    Bias bias{};

    void start(int64_t tile_row, int64_t row_count, int64_t tile_column, const Work& work) {
        row = tile_row;
        rows = row_count;
        column = tile_column;
        done = 0;
        sums = work.to;
        masked = work.masked;
        bias = bias_of(product, column);
    }

    inline void store(int64_t count) {
        for (const int64_t end = least(rows, done + count); done < end; ++done) {
            const float* at = sums.first + done * sums.stride;
            __m512 first = _mm512_loadu_ps(at), second = _mm512_loadu_ps(at + kSide);
            if (masked != nullptr) {
                const float* more = masked + done * kTileColumns;
                const TileBits bits =
                    bits_of(product.right.even_odd, product.addend.keep.row(row + done) + column / 8);
                first = _mm512_mask_add_ps(first, bits.first, first, _mm512_loadu_ps(more));
                second = _mm512_mask_add_ps(second, bits.second, second, _mm512_loadu_ps(more + kSide));
            }
            store_row(product, row + done, column, bias, first, second);
        }
    }
};

template <bool kBoth>
void multiply_tile(const Work& work, Pending& pending) {
    const auto accumulate_addend = [&] {
        if (work.halves)
            accumulate_halves<kBoth>(work.addend_left, work.addend_right, work.addend_pairs);
        else
            accumulate<kBoth>(work.addend_left, work.addend_right, work.addend_pairs, [](int64_t) {});
    };
    if (work.masked != nullptr) {
        no_sums();
        accumulate_addend();
        store_sums<kBoth>({work.masked, kTileColumns});
    }
    if (work.first)
        no_sums();
    else
        load_sums<kBoth>(work.from);
    if (work.masked == nullptr) accumulate_addend();
    const int64_t steps = work.pairs / kSide, a_step = (pending.rows + steps - 1) / steps;
    const char* ahead = work.next.first + work.ahead_row * work.next.row;
    accumulate<kBoth>(work.left, work.right, work.pairs, [&](int64_t step) {
        for (int64_t i = 0; i < work.ahead_rows; ++i)
            _mm_prefetch(ahead + step * work.next.step + i * work.next.row, _MM_HINT_T1);
        pending.store(a_step);
    });
    pending.store(kBlockRows);
    store_sums<kBoth>(work.to);
    memory_barrier_of_tiles();
}

struct TileRegisters {
    static constexpr int64_t kRows = kBlockRows, kTiles = kPanelTiles, kMultiple = kSide, kWords = 1024,
                             kWordValues = 2;
    static constexpr bool kTakesAddend = true;

    static int64_t chunk(int64_t pairs, int64_t fit) {
        return pairs <= fit ? pairs : fit / 2 / kChunkMultiple * kChunkMultiple;
    }
    static int64_t rows_in_place(const Product& product) {
        return readable_in_place(product) ? product.rows / kRows * kRows : 0;
    }

    // As [pairs / 16][rows][16].
    static void arrange_block(const Product& product, int64_t first_row, int64_t rows, int64_t first_pair,
                              int64_t pairs, uint32_t* out) {
        const int64_t filled = filled_up(rows, kSide);
        for (int64_t m = 0; m < filled; ++m) {
            const BFloat16* x = bf16_row(product, first_row + m);
            for (int64_t p = 0; p < pairs; p += kSide) {
                const int64_t k = 2 * (first_pair + p), left = m < rows ? product.inner - k : 0;
                const __mmask32 mask = left < 32 ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
                _mm512_store_si512(out + p * filled + m * kSide, _mm512_maskz_loadu_epi16(mask, x + k));
            }
        }
    }

    const Product& product;
    const Product addend = addend_alone(product);
    const Arranged arranged;
    const int64_t piece = pairs_of_piece();
    alignas(64) float sums[kTiles][kRows * kTileColumns];  // from piece to piece
    alignas(64) float masked[2][kRows * kTileColumns];     // in turn: one is pending
    int turn = 0;
    Pending pending{product};

    TileRegisters(const Product& product_arg, const Arranged& arranged_arg)
        : product(product_arg), arranged(arranged_arg) {
        _tile_loadconfig(&kTileShapes);
    }

    void multiply(const Panel& panel, const Block& block) {
        memory_barrier_of_tiles();
        Left left = left_of(product, arranged.x, block.row, panel.chunk, panel.words);
        Left next = left_of(product, arranged.x, block.next, panel.chunk, panel.words);
        const Left addend_left = left_of(addend, arranged.addend_left, block.row, 0, panel.addend_words);
        const int64_t ahead_rows = kRows / panel.tiles;
        for (int64_t first = 0; first < panel.words; first += piece) {
            const int64_t pairs = least(piece, panel.words - first);
            const bool begins = first == 0, ends = first + pairs == panel.words, last = ends && panel.last;
            const bool masks = last && panel.addend_words != 0 && product.addend.keep.bits != nullptr;
            for (int64_t i = 0; i < panel.tiles; ++i) {
                const Sums own_sums{.first = sums[begins && ends ? 0 : i], .stride = kTileColumns};
                const Sums chunk_sums{.first = block.sums + i * kTileColumns, .stride = kPanelColumns};
                const Work work{.left = left,
                                .addend_left = addend_left,
                                .next = next,
                                .right = panel.right + (i * panel.words + first) * kTileColumns,
                                .addend_right = panel.addend_right + i * panel.addend_words * kTileColumns,
                                .pairs = pairs,
                                .addend_pairs = last ? panel.addend_words : 0,
                                .ahead_row = i * ahead_rows,
                                .ahead_rows = ahead_rows,
                                .halves = product.addend.halves,
                                .from = begins ? chunk_sums : own_sums,
                                .to = ends && !panel.last ? chunk_sums : own_sums,
                                .masked = masks ? masked[turn ^= 1] : nullptr,
                                .first = begins && panel.first};
                block.rows > kSide ? multiply_tile<true>(work, pending) : multiply_tile<false>(work, pending);
                if (last) pending.start(block.row, block.rows, (panel.tile + i) * kTileColumns, work);
            }
            left.first += piece / kSide * left.step;
            next.first += piece / kSide * next.step;
        }
    }

    void finish() {
        pending.store(kRows);
        _tile_release();
    }
};

}  // namespace

void fill_amx(Kernel& kernel) { kernel = kernel_of<TileRegisters>(); }

}  // namespace gemm
}  // namespace peftcore
