// quantize and dequantize: each value gets the nearest code, and each code becomes one product, rounded once.
#include "checks.h"

namespace peftcore {
namespace {

template <typename T>
void try_values(const quant4::Kernels& kernels, const Values<T>& x, int64_t blocksize, bool finite) {
    if (left_out()) return;
    const int64_t count = x.count(), blocks = ceil_div(count, blocksize);
    Values<uint8_t> codes((count + 1) / 2);
    Values<float> absmax(blocks);
    Values<T> y(count);
    kernels.quantize(
        {x.data(), dtype_of<T>, count, blocksize, quant4::make_codebook(kCode), codes.data(), absmax.data()},
        0, blocks);
    WeightView weight;
    weight.rows = 1;
    weight.columns = count;
    weight.codes = codes.data();
    weight.absmax = absmax.data();
    weight.quant_map = kCode;
    weight.shift = log2_of(blocksize);
    kernels.dequantize({weight, dtype_of<T>, y.data(), false}, 0, blocks);
    for (int64_t i = 0; i < count && finite; ++i) {
        const double largest = absmax[i / blocksize], value = to_float(x[i]);
        const int code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
        double nearest = 1e9;
        for (float entry : kCode) nearest = std::min(nearest, std::fabs(value - entry * largest));
        require(std::fabs(value) <= largest, "absmax", i);
        require(std::fabs(value - kCode[code] * largest) <= nearest + largest * 0x1p-22, "quantize", i);
        require(to_float(y[i]) == to_float(from_float<T>(kCode[code] * absmax[i / blocksize])), "dequantize",
                i);
    }
    note(codes), note(absmax), note(y);
    ++cases;
}

template <typename T>
void try_dtype(const quant4::Kernels& kernels) {
    for (int64_t blocksize : {32, 64, 4096})
        for (int64_t count : {1, 63, 2050, 8209}) {
            try_values(kernels, numbers<T>(count), blocksize, true);
            // Blocks of zeros, of what is almost none, and with values that are not finite.
            Values<T> odd = numbers<T>(count);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t block = i / blocksize;
                if (block % 5 == 0) odd[i] = from_float<T>(block % 2 ? -0.0f : 0.0f);
                if (block % 5 == 1) odd[i] = from_float<T>(to_float(odd[i]) * 0x1p-128f);
                if (block % 5 == 2 && i % 37 == 0) odd[i] = from_float<T>(i % 2 ? INFINITY : -INFINITY);
                if (block % 5 == 3 && i % 41 == 0) odd[i] = from_float<T>(NAN);
            }
            try_values(kernels, odd, blocksize, false);
        }
}

}  // namespace

void try_quant4(const CpuKernels& kernels) {
    try_dtype<float>(kernels.quant4);
    try_dtype<Half>(kernels.quant4);
    try_dtype<BFloat16>(kernels.quant4);
}

}  // namespace peftcore
