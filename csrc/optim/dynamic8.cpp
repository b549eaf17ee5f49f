#include "optim/dynamic8.h"

#include <algorithm>
#include <cmath>

namespace peftcore {
namespace optim {
namespace {

// Edge `i` of `parts` equal parts of [0.1, 1] in fp32, counted from the nearer end, product and sum rounded
// once: the bits of torch.linspace.
float edge(int i, int parts) {
    const float step = (1.0f - 0.1f) / float(parts);
    return i < (parts + 1) / 2 ? std::fma(step, float(i), 0.1f) : std::fma(-step, float(parts - i), 1.0f);
}

Map make_map(bool is_signed) {
    const int s = is_signed ? 0 : 1;
    Map map = {};
    float* value = map.value;
    int count = 0;
    value[count++] = 0.0f;
    value[count++] = 1.0f;
    for (int d = 0; d < 7; ++d) {
        const int parts = 1 << (d + s);
        for (int i = 0; i < parts; ++i) {
            const float middle = (edge(i, parts) + edge(i + 1, parts)) / 2.0f;
            value[count] = middle * float(std::pow(10.0, d - 6));
            if (is_signed) value[count + 1] = -value[count];
            count += 2 - s;
        }
    }
    std::sort(value, value + 256);

    // Region 0 is encoded as zero (unsigned: as the smallest entry), 1 to 7 are the decades, 8 is the entry 1.
    Encoder& encoder = map.encoder;
    const int zero = is_signed ? 127 : -1;  // the code of magnitude n is zero + n
    float begin[9];
    begin[0] = 0;
    begin[1] = is_signed ? value[zero + 1] / 2 : value[1];
    for (int region = 2; region <= 8; ++region) {
        const int first = 1 << (region - 1 + s);
        begin[region] = (value[zero + first - 1] + value[zero + first]) / 2;
    }
    // Regions 0 and 8 have one n each: parts 8/9 and parts 2, with a margin for rounding before truncation.
    float slope[9] = {}, parts[9];
    parts[0] = is_signed ? 0 : 2.5f;
    slope[8] = 2;
    parts[8] = (float(1 << (7 + s)) + 0.5f) / 2;
    for (int d = 0; d < 7; ++d) {
        slope[d + 1] = float(std::pow(10.0, 6 - d) / 0.9);
        parts[d + 1] = float(1 << (d + s));
    }
    for (int index = 0; index < 16; ++index) {
        const float low = std::ldexp(1.0f, 2 * index - 31), high = 4 * low;
        int region = 0;
        while (region < 8 && begin[region + 1] < low) ++region;
        const bool divided = region < 8 && begin[region + 1] < high;
        encoder.threshold[index] = divided ? begin[region + 1] : INFINITY;
        for (int above : {0, 1}) {
            encoder.slope[index + 16 * above] = slope[region + (divided && above)];
            encoder.parts[index + 16 * above] = parts[region + (divided && above)];
        }
    }
    return map;
}

}  // namespace

const Map& signed_map() {
    static const Map map = make_map(true);
    return map;
}

const Map& unsigned_map() {
    static const Map map = make_map(false);
    return map;
}

}  // namespace optim
}  // namespace peftcore
