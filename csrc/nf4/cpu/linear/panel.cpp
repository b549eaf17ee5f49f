#include "nf4/cpu/linear/panel.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/workspace.h"
#include "nf4/cpu/dequantize.h"

namespace peftcore {
namespace nf4 {
namespace {

constexpr int64_t kValuesPerTask = 32768;
// Writes W's flat elements [begin, end) in pieces of `piece` values, a divisor of the block size.
struct Segments {
    const Packed& weight;
    Scales scales;
    Kernels level;
    DequantizeArgs args;
    int shift;
    int64_t piece, itemsize;

    // begin and end are multiples of a piece, or the end of W.
    void aligned(int64_t begin, int64_t end, void* out, std::vector<float>& absmax) const {
        const int64_t pieces = ceil_div(end - begin, piece);
        absmax.resize(size_t(pieces));
        int64_t block = -1;
        float scale = 0;
        for (int64_t i = 0; i < pieces; ++i) {
            const int64_t of = (begin + i * piece) >> shift;
            if (of != block) scale = scales[block = of];
            absmax[size_t(i)] = scale;
        }
        DequantizeArgs own = args;
        own.packed = args.packed + begin / 2;
        own.scales.absmax = absmax.data();
        own.count = end - begin;
        own.out = out;
        level.dequantize(own, 0, pieces);
    }

    void any(int64_t begin, int64_t end, char* out, std::vector<float>& absmax,
             std::vector<char>& whole) const {
        const int64_t from = begin / piece * piece, to = std::min(ceil_div(end, piece) * piece, weight.count);
        if (from == begin && to == end) return aligned(begin, end, out, absmax);
        whole.resize(size_t((to - from) * itemsize));
        aligned(from, to, whole.data(), absmax);
        std::memcpy(out, whole.data() + (begin - from) * itemsize, size_t((end - begin) * itemsize));
    }
};

}  // namespace

Tensor dequantized_panel(const Packed& weight, int64_t width, Range rows, Range columns,
                         const at::TensorOptions& options) {
    const int64_t height = rows.last - rows.first, across = columns.last - columns.first;
    const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
    Segments segments{weight,
                      scales_of(weight),
                      kernels(),
                      {},
                      shift_of(weight.blocksize),
                      weight.blocksize,
                      int64_t(options.dtype().itemsize())};
    // Pieces small enough that rows begin with one, where that is possible.
    while (segments.piece > kPanelColumns && (width % segments.piece || across % segments.piece))
        segments.piece /= 2;
    segments.args.packed = weight.bytes.const_data_ptr<uint8_t>();
    std::copy_n(weight.code.const_data_ptr<float>(), 16, segments.args.code);
    segments.args.blocksize = segments.piece;
    segments.args.dtype = kernel_dtype(dtype, "linear_4bit");
    segments.args.stream = false;
    char* out = static_cast<char*>(workspace(height * across * segments.itemsize));
    at::parallel_for(0, height, ceil_div(kValuesPerTask, across), [&](int64_t first, int64_t last) {
        std::vector<float> absmax;
        std::vector<char> whole;
        for (int64_t row = first; row < last; ++row) {
            const int64_t begin = (rows.first + row) * width + columns.first;
            segments.any(begin, begin + across, out + row * across * segments.itemsize, absmax, whole);
        }
    });
    return at::from_blob(out, {height, across}, options);
}

}  // namespace nf4
}  // namespace peftcore
