// A codebook in bf16, for dot products.
#pragma once

#include <cstring>

namespace peftcore {
namespace quant4 {
namespace {

// The entries times `1 / inverse`, rounded. The factor is the one of 128 in [1, 2) that loses least of the squares: NF4
// times 1.12 loses 0.07 % of its norm, unscaled 0.11 %, and times each block's scale, as in unpacking W, 0.17 %. FP4
// times 1.008, whose entries are thirds, loses nothing.
//
// A level has a `Table` of them, and `round(code, factor, table)`, which makes it and returns the squares lost, of
// entries that are not scaled.
template <typename Level>
struct RoundedCodebook {
    explicit RoundedCodebook(const float* code) {
        std::memcpy(of, code, sizeof of);
        float least = 0;
        for (int i = 0; i < 128; ++i) {
            const float factor = 1.0f + float(i) / 128;
            typename Level::Table rounded;
            const float squares = Level::round(code, factor, rounded);
            if (i > 0 && !(squares < least)) continue;
            least = squares;
            table = rounded;
            inverse = 1.0f / factor;
        }
    }

    typename Level::Table table;
    float inverse;
    float of[16];
};

}  // namespace
}  // namespace quant4
}  // namespace peftcore
