// Few rows of x by a weight in 4 bits, each way by itself.
#include "checks.h"

namespace peftcore {
namespace {

// The codebook as dot products of bf16 take it: scaled by the factor at which it loses least, rounded, scaled back.
std::vector<double> rounded_code() {
    std::vector<double> best;
    double least = INFINITY;
    for (int i = 0; i < 128; ++i) {
        const float factor = 1.0f + float(i) / 128;
        std::vector<double> entries;
        double squares = 0;
        for (float entry : kCode) {
            entries.push_back(double(to_float(from_float<BFloat16>(entry * factor))) / factor);
            squares += (entries.back() - entry) * (entries.back() - entry);
        }
        if (squares >= least) continue;
        least = squares;
        best = entries;
    }
    return best;
}

struct Way {
    const char* name;
    const quant4::LinearKernel& kernel;
    std::vector<double> code;
    double lost;
};

template <typename T>
void try_product(const Way& way, const Packed& packed, int64_t batch, bool has_bias) {
    if (left_out()) return;
    const WeightView& weight = packed.view;
    const int64_t rows = weight.rows, columns = weight.columns, granule = way.kernel.granule;
    const Values<T> x = numbers<T>(batch * columns), bias = numbers<T>(rows);
    Values<T> y(batch * rows);
    const int64_t bytes = filled_up(way.kernel.arranged_bytes(batch, columns), 64);
    void* arranged = std::aligned_alloc(64, size_t(bytes));
    require(way.kernel.arrange(x.data(), dtype_of<T>, batch, columns, arranged), "arrange", batch);
    const quant4::LinearCall call{weight,   batch,      arranged, has_bias ? bias.data() : nullptr,
                                  y.data(), dtype_of<T>};
    const int64_t middle = least(rows, filled_up(rows / 2, granule));  // two threads' parts
    way.kernel.run(call, 0, middle);
    way.kernel.run(call, middle, rows);
    std::free(arranged);
    for (int64_t m = 0; m < batch; ++m)
        for (int64_t n = 0; n < rows; ++n) {
            double sum = has_bias ? to_float(bias[n]) : 0, magnitude = std::fabs(sum);
            for (int64_t k = 0; k < columns; ++k) {
                const int64_t i = n * columns + k;
                const double product =
                    to_float(x[m * columns + k]) * way.code[size_t(packed.code(i))] * packed.scale(i);
                sum += product;
                magnitude += std::fabs(product);
            }
            close(y[m * rows + n], sum, magnitude, way.name, m * rows + n, way.lost);
        }
    note(y);
    ++cases;
}

template <typename T>
void try_dtype(const Way& way) {
    const quant4::LinearKernel& kernel = way.kernel;
    const Dtype dtype = dtype_of<T>;
    int kind = 0;
    for (int64_t columns : {8, 64, 104, 320, 712, 2368})
        for (int64_t blocksize : {32, 64, 4096})
            for (int64_t rows : {1, 6, 33}) {
                if (columns % kernel.column_multiple != 0) continue;
                if (columns > 1000 && rows != 33) continue;
                const Packed packed(rows, columns, blocksize, ScaleKind(kind++ % 4));
                for (int64_t batch : {1, 2, 3, 4, 5, 8, 15, 32})
                    if (batch >= kernel.min_batch && batch <= kernel.max_batch[int(dtype)])
                        try_product<T>(way, packed, batch, batch % 2 == 1);
            }
}

}  // namespace

void try_linear(const CpuKernels& kernels) {
    const std::vector<double> exact(kCode, kCode + 16);
    const Way ways[] = {{"rows", kernels.linear.rows, exact, 0x1p-20},
                        {"integers", kernels.linear.integers, exact, 0x1p-11},
                        {"dots", kernels.linear.dots, rounded_code(), 0x1p-20},
                        {"tile", kernels.linear.tile, rounded_code(), 0x1p-20}};
    for (const Way& way : ways) {
        if (way.kernel.run == nullptr) continue;
        try_dtype<float>(way);
        try_dtype<Half>(way);
        try_dtype<BFloat16>(way);
    }
}

}  // namespace peftcore
