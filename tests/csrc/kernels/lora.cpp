// LoRA's low-rank products, norms and scaling by column, compared with sums in double.
#include "checks.h"

namespace peftcore {
namespace {

// Masks keep what has its bit set.
struct Kept {
    std::vector<uint8_t> bytes;
    lora::Mask mask;
    bool operator()(int64_t m, int64_t n) const {
        return mask.bits == nullptr || (mask.row(m)[n / 8] >> n % 8 & 1);
    }
};

Kept mask_of(const lora::ThinKernels& thin, int64_t rows, int64_t columns, bool drops) {
    Kept kept;
    if (!drops) return kept;
    const int64_t counters = ceil_div(columns, 8), stride = ceil_div(counters, 16) * 16;
    kept.bytes.resize(size_t(rows * stride));
    const Dropout dropout{20000, 3, 4};
    for (int64_t m = 0; m < rows; ++m)
        thin.keep_bytes(dropout, m, 0, counters, kept.bytes.data() + m * stride);
    kept.mask = {kept.bytes.data(), stride};
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; ++n)
            require(kept(m, n) == bool(keeps(dropout_words(dropout, m, n / 8), int(n % 8), 20000)),
                    "keep_bytes", m * columns + n);
    return kept;
}

// A factor [inner, outer] as the kernels read it.
Values<float> arranged(const lora::Arrangement& how, const Values<float>& from, int64_t inner, int64_t outer,
                       int64_t width) {
    Values<float> out(size_t(ceil_div(inner, how.pair) * width * how.unit_size) / sizeof(float));
    how.arrange(from.data(), outer, 1, inner, outer, width, out.data());
    return out;
}

template <typename T>
void try_products(const CpuKernels& kernels, int64_t rows, int64_t columns, int64_t r, bool drops) {
    if (left_out()) return;
    constexpr Dtype dtype = dtype_of<T>;
    const lora::ThinKernels& thin = kernels.lora.thin[int(dtype)];
    const int64_t width = ceil_div(r, 16) * 16, wide = ceil_div(columns, 32) * 32;
    const Values<T> x = numbers<T>(rows * columns);
    const Values<float> a = numbers<float>(columns * r), b = numbers<float>(r * columns),
                        left = numbers<float>(rows * r), g = numbers<float>(columns);
    const Kept kept = mask_of(thin, rows, columns, drops);
    const auto at = [&](int64_t m, int64_t n) {
        return kept(m, n) ? double(to_float(x[m * columns + n])) : 0;
    };
    const auto a_units = arranged(thin.arrangement, a, columns, r, width);
    const auto b_units = arranged(thin.plain, b, r, columns, wide);
    const auto left_units = arranged(thin.arrangement, left, rows, r, width);
    // Each tries one product, and what it should be.
    Values<float> s(rows * r), sums(width * wide), norms(rows), moved(wide);
    thin.down({x.data(), columns, a_units.data(), width, r, 0.5f, kept.mask, s.data()}, 0, rows);
    Values<T> y = x, scaled(rows * columns), dx(rows * columns);
    thin.up({y.data(), columns, left.data(), r, b_units.data(), wide, kept.mask}, 0, rows);
    for (int64_t m = 0; m < rows; m += lora::kRowGrain)
        thin.outer(
            {x.data(), columns, left_units.data(), width, r, kept.mask, false, 0, columns, sums.data()}, m,
            std::min(m + lora::kRowGrain, rows));
    kernels.norms.row_norms[int(dtype)](
        {x.data(), columns, left.data(), r, b_units.data(), wide, norms.data()}, 0, rows);
    kernels.elementwise.scale[int(dtype)].scale({x.data(), columns, g.data(), scaled.data()}, 0, rows);
    kernels.elementwise.scale[int(dtype)].backward(
        {y.data(), x.data(), columns, g.data(), 0, columns, dx.data(), moved.data()}, 0, rows);
    for (int64_t m = 0; m < rows; ++m) {
        double squares = 0;
        for (int64_t j = 0; j < r; ++j) {
            double sum = 0, magnitude = 0;
            for (int64_t n = 0; n < columns; ++n) {
                sum += 0.5 * at(m, n) * a[n * r + j];
                magnitude += std::fabs(at(m, n) * a[n * r + j]);
            }
            close(s[m * r + j], sum, magnitude, "down", m * r + j);
        }
        for (int64_t n = 0; n < columns; ++n) {
            const double value = to_float(x[m * columns + n]);
            double sum = 0, magnitude = std::fabs(value);
            for (int64_t j = 0; j < r; ++j) {
                sum += double(left[m * r + j]) * b[j * columns + n];
                magnitude += std::fabs(double(left[m * r + j]) * b[j * columns + n]);
            }
            close(y[m * columns + n], value + (kept(m, n) ? sum : 0), magnitude, "up", m * columns + n);
            close(scaled[m * columns + n], value * g[n], 0, "scale", m * columns + n);
            close(dx[m * columns + n], double(to_float(y[m * columns + n])) * g[n], 0, "dx", m * columns + n);
            squares += (value + sum) * (value + sum);
        }
        close(norms[m], std::sqrt(squares), std::sqrt(squares) * 8, "norms", m);
    }
    for (int64_t n = 0; n < columns; ++n) {
        double dg = 0, all = 0;
        for (int64_t m = 0; m < rows; ++m) {
            const double product = double(to_float(y[m * columns + n])) * to_float(x[m * columns + n]);
            dg += product;
            all += std::fabs(product);
        }
        close(moved[n], dg, all, "dg", n);
        for (int64_t j = 0; j < r; ++j) {
            double sum = 0, magnitude = 0;
            for (int64_t m = 0; m < rows; ++m) {
                sum += left[m * r + j] * at(m, n);
                magnitude += std::fabs(left[m * r + j] * at(m, n));
            }
            close(sums[j * wide + n], sum, magnitude, "outer", j * columns + n);
        }
    }
    note(s), note(y), note(norms), note(scaled), note(dx);
    ++cases;
}

template <typename T>
void try_row(const CpuKernels& kernels, int64_t inner, int64_t outer) {
    if (left_out()) return;
    constexpr Dtype dtype = dtype_of<T>;
    const lora::RowKernels& row = kernels.lora.row[int(dtype)];
    const Values<T> x = numbers<T>(inner), factor = numbers<T>(outer * inner);
    Values<float> wide(inner + 16), out(outer + 16);
    Values<T> to = numbers<T>(outer);
    const Values<T> before = to;
    row.widen(x.data(), inner, wide.data());
    row.multiply(wide.data(), factor.data(), inner, outer, out.data());
    row.add(out.data(), outer, to.data());
    for (int64_t i = 0; i < outer; ++i) {
        double sum = 0, magnitude = 0;
        for (int64_t j = 0; j < inner; ++j) {
            sum += double(to_float(x[j])) * to_float(factor[i * inner + j]);
            magnitude += std::fabs(double(to_float(x[j])) * to_float(factor[i * inner + j]));
        }
        close(out[i], sum, magnitude, "multiply", i);
        close(to[i], double(to_float(before[i])) + out[i], 0, "add", i);
    }
    note(to);
    ++cases;
}

template <typename T>
void try_dtype(const CpuKernels& kernels) {
    for (int64_t rows : {1, 7, 70})
        for (int64_t columns : {8, 75, 300})
            for (int64_t r : {1, 16, 33})
                for (bool drops : {false, true}) try_products<T>(kernels, rows, columns, r, drops);
    for (int64_t inner : {1, 19, 700})
        for (int64_t outer : {1, 21}) try_row<T>(kernels, inner, outer);
}

}  // namespace

void try_lora(const CpuKernels& kernels) {
    try_dtype<float>(kernels);
    try_dtype<Half>(kernels);
    try_dtype<BFloat16>(kernels);
}

}  // namespace peftcore
