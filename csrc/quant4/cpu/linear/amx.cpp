// "tile" on AMX: 32 rows of W times up to 32 rows of x, as yᵀ = W xᵀ. A row of W is then a row of a tile in the order
// of its codes; x, which is small, is transposed.
//
// Unpacking takes most of the time: 64 columns are unpacked while the previous ones are multiplied.
#include "common/amx.h"

#include "common/avx512.h"
#include "quant4/cpu/avx512bf16.h"
#include "quant4/cpu/linear/kernels.h"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kRows = 2 * kSide, kStep = 32, kColumns = 2 * kStep;  // a tile takes kStep columns

int64_t arranged_bytes(int64_t batch, int64_t columns) { return 2 * filled_up(batch, kSide) * columns; }

// [tiles of x's rows][pairs of columns][16 rows], missing rows zero.
bool arrange(const void* from, Dtype, int64_t batch, int64_t columns, void* to) {
    const uint32_t* x = static_cast<const uint32_t*>(from);
    uint32_t* out = static_cast<uint32_t*>(to);
    const int64_t pairs = columns / 2;
    for (int64_t first = 0; first < batch; first += kSide, out += pairs * kSide, x += kSide * pairs) {
        const int64_t rows = batch - first < kSide ? batch - first : kSide;
        const __mmask16 there = __mmask16((1u << rows) - 1);
        alignas(64) int32_t at[kSide];
        for (int32_t m = 0; m < kSide; ++m) at[m] = m < rows ? m : 0;
        const __m512i offsets = _mm512_mullo_epi32(_mm512_load_si512(at), _mm512_set1_epi32(int32_t(pairs)));
        for (int64_t p = 0; p < pairs; ++p)
            _mm512_store_si512(out + p * kSide,
                               _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, offsets, x + p, 4));
    }
    return true;
}

// [step][row][kStep].
struct Unpacked {
    alignas(64) uint16_t values[2][kRows][kStep];
};

inline void unpack(const WeightView& weight, __m512 code, int64_t first_row, int64_t column, Unpacked& out) {
    for (int64_t r = 0; r < kRows; ++r) {
        // Behind the last row that row is repeated; its results are not stored.
        const int64_t row = first_row + r < weight.rows ? first_row + r : weight.rows - 1;
        const int64_t begin = row * weight.columns + column;
        const uint8_t* packed = weight.codes + begin / 2;
        _mm_prefetch(reinterpret_cast<const char*>(packed + 256), _MM_HINT_T0);
        __m512i table = scaled(code, weight, begin >> weight.shift);
        _mm512_store_si512(out.values[0][r], decoded(packed, table));
        if ((1 << weight.shift) < kColumns) table = scaled(code, weight, (begin + kStep) >> weight.shift);
        _mm512_store_si512(out.values[1][r], decoded(packed + kStep / 2, table));
    }
}

// W's rows go through tiles 4 and 5, x's through 6 and 7.
template <bool kBoth>
inline void multiply(const Unpacked& w, const uint32_t* x, int64_t x_tile) {
    for (int step = 0; step < 2; ++step, x += kTileWords) {
        _tile_loadd(6, x, kRowBytes);
        _tile_loadd(4, w.values[step][0], kRowBytes);
        _tile_loadd(5, w.values[step][kSide], kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (kBoth) {
            _tile_loadd(7, x + x_tile, kRowBytes);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

// Transposes and rounds sums[x's row / 16][row of W][x's row % 16].
void store(const LinearCall& args, int64_t first_row, const float (*sums)[kRows][kSide]) {
    const int64_t left = args.weight.rows - first_row;
    const __mmask32 there = left < kRows ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
    const BFloat16* bias = static_cast<const BFloat16*>(args.bias);
    const __m512i added =
        bias == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(there, bias + first_row);
    const __m512 low = from_bf16(_mm512_castsi512_si256(added)),
                 high = from_bf16(_mm512_extracti64x4_epi64(added, 1));
    const __m512i rows = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(kSide));
    for (int64_t m = 0; m < args.batch; ++m) {
        const float* from = &sums[m / kSide][0][m % kSide];
        const __m256i first = to_bf16(_mm512_add_ps(_mm512_i32gather_ps(rows, from, 4), low));
        const __m256i second = to_bf16(_mm512_add_ps(_mm512_i32gather_ps(rows, from + kTileWords, 4), high));
        _mm512_mask_storeu_epi16(static_cast<BFloat16*>(args.y) + m * args.weight.rows + first_row, there,
                                 _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
    }
}

template <bool kBoth>
void run_rows(const LinearCall& args, int64_t first_row, int64_t last_row) {
    const WeightView& weight = args.weight;
    const __m512 code = _mm512_loadu_ps(weight.quant_map);
    const int64_t columns = weight.columns, x_tile = columns / 2 * kSide;
    alignas(64) float sums[2][kRows][kSide];
    Unpacked block[2];
    for (int64_t row = first_row; row < last_row; row += kRows) {
        const uint32_t* x = static_cast<const uint32_t*>(args.x);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        unpack(weight, code, row, 0, block[0]);
        for (int64_t column = 0; column < columns; column += kColumns, x += 2 * kTileWords) {
            const int which = int(column / kColumns) & 1;
            if (column + kColumns < columns) unpack(weight, code, row, column + kColumns, block[1 - which]);
            memory_barrier_of_tiles();
            multiply<kBoth>(block[which], x, x_tile);
        }
        _tile_stored(0, sums[0], kRowBytes);
        _tile_stored(1, sums[0][kSide], kRowBytes);
        if (kBoth) {
            _tile_stored(2, sums[1], kRowBytes);
            _tile_stored(3, sums[1][kSide], kRowBytes);
        }
        memory_barrier_of_tiles();
        store(args, row, sums);
    }
}

void run(const LinearCall& args, int64_t first_row, int64_t last_row) {
    _tile_loadconfig(&kTileShapes);
    args.batch > kSide ? run_rows<true>(args, first_row, last_row)
                       : run_rows<false>(args, first_row, last_row);
    _tile_release();
}

}  // namespace

// Measured on Sapphire Rapids, 4096 x 4096: 0.61 to 0.65 ms for 1 to 16 rows of x; "rows" of AVX-512 take 0.46 for
// one.
void fill_amx(LinearKernels& kernels) {
    static_assert(kTileBatch == 2 * kSide);
    // With more rows the library is faster: processors with AMX multiply fp16.
    kernels.integers.max_batch[int(Dtype::kHalf)] = kTileBatch;
    kernels.dots.max_batch[int(Dtype::kBFloat16)] = 1;
    kernels.tile = {.granule = kRows,
                    .min_batch = 2,
                    .max_batch = {0, 0, kTileBatch},
                    .column_multiple = kColumns,
                    .zero_input = ZeroInput::kNothing,
                    .arranged_bytes = arranged_bytes,
                    .arrange = arrange,
                    .run = run};
}

}  // namespace quant4
}  // namespace peftcore
