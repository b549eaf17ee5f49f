#include "gemm/cpu/product.h"

#include <algorithm>

#include "common/caches.h"
#include "common/threads.h"
#include "common/workspace.h"
#include "gemm/cpu/kernels.h"

namespace peftcore {
namespace gemm {
namespace {

// Rows that are multiplied by a panel once it is unpacked; unpacking costs less than a hundredth of the products.
constexpr int64_t kGroupRows = 1536;
// Rows for which a panel is worth unpacking again, so that more threads have work; a multiple of every
// kernel's block.
constexpr int64_t kLeastRows = 96;

// Pointer advanced by `count` values of a dtype.
const void* advanced(const void* values, Dtype dtype, int64_t count) {
    return static_cast<const char*>(values) + count * itemsize(dtype);
}

// Rows of a group, whose arranged copy stays in part of the L3 cache.
int64_t group_rows(int64_t depth) {
    const int64_t fit = caches().third / 4 * 3 / (depth * int64_t(sizeof(uint32_t)));
    return std::clamp(fit / kLeastRows * kLeastRows, kLeastRows, kGroupRows);
}

void multiply_group(const Kernel& kernel, const Product& product) {
    const int64_t rows = product.rows, blocks = ceil_div(rows, kernel.rows);
    const int64_t depth = filled_up(product.words(), kernel.multiple), chunk = kernel.chunk(depth);
    const int64_t tiles = ceil_div(product.columns, kTileColumns), threads = threads_here();
    // A task has any tiles; where sums remain in memory, whole panels.
    const int64_t unit = product.sums != nullptr ? kernel.tiles : 1, units = ceil_div(tiles, unit);
    // Rows are divided only where there are too few columns for all threads.
    const int64_t target_parts = units >= 4 * threads ? 1 : ceil_div(4 * threads, units);
    const int64_t part_rows =
        ceil_div(blocks, std::min(target_parts, ceil_div(rows, kLeastRows))) * kernel.rows;
    const int64_t parts = ceil_div(rows, part_rows);
    const Product addend = addend_alone(product);
    const int64_t addend_depth = filled_up(addend.words(), kernel.multiple);
    const int64_t panel_words = kernel.tiles * chunk * kTileColumns,
                  addend_words = kernel.tiles * addend_depth * kTileColumns;
    const int64_t sums =
                      chunk < depth && product.sums == nullptr ? part_rows * kernel.tiles * kTileColumns : 0,
                  words_per_thread = panel_words + addend_words + sums;
    const int64_t all_rows = filled_up(rows, kernel.multiple);
    const auto words_of = [&](const Product& matrix, int64_t matrix_depth) {
        return kernel.rows_in_place(matrix) == rows ? 0 : filled_up(all_rows * matrix_depth, 16);
    };
    const int64_t x_words = words_of(product, depth), left_words = words_of(addend, addend_depth);
    uint32_t* x = static_cast<uint32_t*>(workspace(4 * (x_words + left_words + threads * words_per_thread)));
    uint32_t *left = x + x_words, *buffers = left + left_words;
    const auto arrange = [&](const Product& matrix, int64_t matrix_depth, int64_t matrix_chunk,
                             uint32_t* out) {
        at::parallel_for(ceil_div(kernel.rows_in_place(matrix), kernel.rows), blocks,
                         ceil_div(kProductsPerTask, kernel.rows * matrix_depth * 8),
                         [&](int64_t first, int64_t last) {
                             kernel.arrange(matrix, matrix_chunk,
                                            {first * kernel.rows, std::min(last * kernel.rows, rows)}, out);
                         });
    };
    arrange(product, depth, chunk, x);
    if (addend_depth != 0) arrange(addend, addend_depth, addend_depth, left);
    const int64_t products = kernel.word_values * depth * kTileColumns * unit * part_rows;
    at::parallel_for(
        0, parts * units, ceil_div(kProductsPerTask, products), [&](int64_t first, int64_t last) {
            uint32_t* panel = buffers + at::get_thread_num() * words_per_thread;
            uint32_t* addend_panel = panel + panel_words;
            const Buffers mine{.panel = panel,
                               .addend_panel = addend_panel,
                               .sums = reinterpret_cast<float*>(addend_panel + addend_words)};
            while (first < last) {
                const int64_t part = first / units, begin = first % units;
                const int64_t end = std::min(units, begin + last - first);
                kernel.multiply(product, {x, left}, {begin * unit, std::min(end * unit, tiles)},
                                {part * part_rows, std::min((part + 1) * part_rows, rows)}, mine);
                first += end - begin;
            }
        });
}

}  // namespace

int64_t sums_size(const Kernel& kernel, int64_t rows, int64_t columns) {
    return rows * filled_up(columns, kernel.tiles * kTileColumns);
}

void scale_sums(const Kernel& kernel, const Product& product, int64_t row, float factor) {
    const int64_t width = kernel.tiles * kTileColumns;
    for (int64_t column = 0; column < product.columns; column += width) {
        float* sums = product.sums + column * product.sum_rows + row * width;
        for (int64_t i = 0; i < width; ++i) sums[i] *= factor;
    }
}

void read_sums(const Kernel& kernel, const Product& product, int64_t row, float* out) {
    const int64_t width = kernel.tiles * kTileColumns;
    constexpr int64_t kHalf = kTileColumns / 2;
    for (int64_t column = 0; column < product.columns; ++column) {
        const int64_t panel = column / width * width, tile = (column - panel) / kTileColumns * kTileColumns;
        const int64_t place = column % kTileColumns;
        out[column] = product.sums[panel * product.sum_rows + row * width + tile +
                                   (product.right.even_odd ? place / 2 + place % 2 * kHalf : place)];
    }
}

void multiply(const Kernel& kernel, const Product& asked) {
    Product product = asked;
    product.word_values = kernel.word_values;
    const int64_t step = group_rows(product.words());
    const Dtype addend_dtype = kernel.word_values == 1 ? Dtype::kFloat : Dtype::kBFloat16;
    for (int64_t first = 0; first < product.rows; first += step) {
        Product group = product;
        group.rows = std::min(step, product.rows - first);
        group.x = advanced(product.x, product.dtype, first * product.inner);
        group.y = const_cast<void*>(advanced(product.y, product.dtype, first * product.columns));
        if (group.addend.left != nullptr)
            group.addend.left = advanced(product.addend.left, addend_dtype, first * product.addend.inner);
        group.addend.keep.bits = product.addend.keep.row(first);
        if (group.sums != nullptr) group.sums += first * kernel.tiles * kTileColumns;
        if (first + step < product.rows) group.following = product.right.source;
        multiply_group(kernel, group);
    }
}

}  // namespace gemm
}  // namespace peftcore
