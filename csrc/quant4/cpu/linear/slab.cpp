#include "quant4/cpu/linear/slab.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/integers.h"
#include "common/threads.h"
#include "common/workspace.h"
#include "cpu/kernels.h"

namespace peftcore {
namespace quant4 {
namespace {

// Writes W's flat elements [begin, end) in pieces: a power of two of values that divides the block size.
struct Segments {
    WeightView weight;
    const Kernels& kernels;
    Dtype dtype;
    int piece_shift;
    int64_t itemsize;

    // begin and end are multiples of a piece, or the end of W.
    void write_pieces(int64_t begin, int64_t end, void* out, std::vector<float>& absmax) const {
        const int64_t pieces = ceil_div(end - begin, piece());
        const bool has_zeros = weight.zeros != nullptr;
        absmax.resize(size_t(has_zeros ? 2 * pieces : pieces));
        float* zeros = absmax.data() + pieces;  // behind the scales
        int64_t block = -1;
        float scale = 0;
        for (int64_t i = 0; i < pieces; ++i) {
            const int64_t of = (begin + i * piece()) >> weight.shift;
            if (of != block) scale = block_scale(weight, block = of);
            absmax[size_t(i)] = scale;
            if (has_zeros) zeros[i] = block_zero(weight, of) + float(kCentre);
        }
        WeightView part;
        part.rows = 1;
        part.columns = end - begin;
        part.codes = weight.codes + begin / 2;
        part.absmax = absmax.data();
        part.quant_map = weight.quant_map;
        part.shift = piece_shift;
        if (has_zeros) {
            part.scales = ScaleKind::kAffine;
            part.zeros = zeros;
            part.whole_zeros = false;
        }
        kernels.dequantize({.weight = part, .dtype = dtype, .out = out, .stream = false}, 0, pieces);
    }

    void write(int64_t begin, int64_t end, char* out, std::vector<float>& absmax,
               std::vector<char>& whole) const {
        const int64_t from = begin / piece() * piece(),
                      to = std::min(ceil_div(end, piece()) * piece(), weight.numel());
        if (from == begin && to == end) return write_pieces(begin, end, out, absmax);
        whole.resize(size_t((to - from) * itemsize));
        write_pieces(from, to, whole.data(), absmax);
        std::memcpy(out, whole.data() + (begin - from) * itemsize, size_t((end - begin) * itemsize));
    }

    int64_t piece() const { return int64_t(1) << piece_shift; }
};

}  // namespace

at::Tensor dequantized_slab(const WeightView& weight, Range rows, Range columns,
                            const at::TensorOptions& options) {
    const int64_t height = rows.last - rows.first, across = columns.last - columns.first;
    const int64_t width = weight.columns;
    Segments segments{.weight = weight,
                      .kernels = cpu_kernels().quant4,
                      .dtype = kernel_dtype(c10::typeMetaToScalarType(options.dtype()), "linear_4bit"),
                      .piece_shift = weight.shift,
                      .itemsize = int64_t(options.dtype().itemsize())};
    // Pieces small enough that each row starts with one, where possible.
    while (segments.piece() > kSlabColumns && (width % segments.piece() || across % segments.piece()))
        --segments.piece_shift;
    char* out = static_cast<char*>(workspace(height * across * segments.itemsize));
    at::parallel_for(
        0, height, ceil_div(kValuesPerTask, std::max<int64_t>(1, across)), [&](int64_t first, int64_t last) {
            std::vector<float> absmax;
            std::vector<char> whole;
            for (int64_t row = first; row < last; ++row) {
                const int64_t begin = (rows.first + row) * width + columns.first;
                segments.write(begin, begin + across, out + row * across * segments.itemsize, absmax, whole);
            }
        });
    return at::from_blob(out, {height, across}, options);
}

}  // namespace quant4
}  // namespace peftcore
