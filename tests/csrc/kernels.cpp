// The CPU kernels without PyTorch, beside sums in double. Prints, for each level, how many cases agree, and a digest of
// all results: plain C++ gives the same bits on every processor.
#include "lora/cpu/kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "nf4/cpu/kernels.h"
#include "optim/cpu/kernels.h"

namespace {

using namespace peftcore;

uint64_t digest = 1469598103934665603u;  // FNV-1a
int cases = 0;

template <typename T>
void note(const std::vector<T>& results) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(results.data());
    for (size_t i = 0; i < results.size() * sizeof(T); ++i) digest = (digest ^ bytes[i]) * 1099511628211u;
}

void require(bool condition, const char* what, int64_t i) {
    if (condition) return;
    printf("%s: differs at %lld\n", what, (long long)i);
    exit(1);
}

std::mt19937 source(1);

// Not std::normal_distribution, which every library makes otherwise.
float number() { return (int64_t(source() >> 8) - (1 << 23)) * 0x1p-22f; }

template <typename T>
std::vector<T> numbers(int64_t count) {
    std::vector<T> made(static_cast<size_t>(count));
    for (T& value : made) value = from_float<T>(number());
    return made;
}

template <typename T>
double rounding() {
    return sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
}

// found = sum, of products whose magnitudes are `magnitude` together, rounded to T.
template <typename T>
void close(T found, double sum, double magnitude, const char* what, int64_t i) {
    const double error = std::fabs(double(to_float(found)) - sum);
    require(error <= magnitude * 0x1p-20 + std::fabs(sum) * rounding<T>() + 0x1p-24, what, i);
}

template <typename T>
void try_nf4(const nf4::Kernels& kernels, Dtype dtype, int64_t count, int64_t blocksize) {
    const float map[16] = {-1.0f, -0.7f, -0.52f, -0.39f, -0.28f, -0.18f, -0.09f, 0.0f,
                           0.08f, 0.16f, 0.25f,  0.34f,  0.44f,  0.56f,  0.72f,  1.0f};
    const int64_t blocks = ceil_div(count, blocksize);
    const std::vector<T> x = numbers<T>(count);
    std::vector<uint8_t> codes((count + 1) / 2);
    std::vector<float> absmax(blocks);
    std::vector<T> y(count);
    kernels.quantize(
        {x.data(), dtype, count, blocksize, nf4::make_codebook(map), codes.data(), absmax.data()}, 0, blocks);
    WeightView weight;
    weight.rows = 1;
    weight.columns = count;
    weight.codes = codes.data();
    weight.absmax = absmax.data();
    weight.quant_map = map;
    weight.shift = log2_of(blocksize);
    kernels.dequantize({weight, dtype, y.data(), false}, 0, blocks);
    for (int64_t i = 0; i < count; ++i) {
        const double largest = absmax[i / blocksize], value = to_float(x[i]);
        const int code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
        double nearest = 1e9;
        for (float entry : map) nearest = std::min(nearest, std::fabs(value - entry * largest));
        require(std::fabs(value) <= largest, "absmax", i);
        require(std::fabs(value - map[code] * largest) <= nearest + largest * 0x1p-22, "quantize", i);
        require(to_float(y[i]) == to_float(from_float<T>(map[code] * absmax[i / blocksize])), "dequantize",
                i);
    }
    note(codes), note(absmax), note(y);
    ++cases;
}

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
    const lora::Dropout dropout{20000, 3, 4};
    for (int64_t m = 0; m < rows; ++m)
        thin.keep_bytes(dropout, m, 0, counters, kept.bytes.data() + m * stride);
    kept.mask = {kept.bytes.data(), stride};
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; ++n)
            require(
                kept(m, n) == bool(lora::keeps(lora::dropout_words(dropout, m, n / 8), int(n % 8), 20000)),
                "keep_bytes", m * columns + n);
    return kept;
}

// A factor [inner, outer] as the kernels read it.
std::vector<float> arranged(const lora::Arrangement& how, const std::vector<float>& from, int64_t inner,
                            int64_t outer, int64_t width) {
    std::vector<float> out(size_t(inner * width));
    how.arrange(from.data(), outer, 1, inner, outer, width, out.data());
    return out;
}

template <typename T>
void try_lora(const lora::Kernels& kernels, Dtype dtype, int64_t rows, int64_t columns, int64_t r,
              bool drops) {
    const lora::ThinKernels& thin = kernels.thin[int(dtype)];
    const int64_t width = ceil_div(r, 16) * 16, wide = ceil_div(columns, 32) * 32;
    const std::vector<T> x = numbers<T>(rows * columns);
    const std::vector<float> a = numbers<float>(columns * r), b = numbers<float>(r * columns),
                             left = numbers<float>(rows * r), g = numbers<float>(columns);
    const Kept kept = mask_of(thin, rows, columns, drops);
    const auto at = [&](int64_t m, int64_t n) {
        return kept(m, n) ? double(to_float(x[m * columns + n])) : 0;
    };
    const auto a_units = arranged(thin.arrangement, a, columns, r, width);
    const auto b_units = arranged(thin.plain, b, r, columns, wide);
    const auto left_units = arranged(thin.arrangement, left, rows, r, width);
    // Each tries one product, and what it should be.
    std::vector<float> s(rows * r), sums(width * wide), norms(rows), moved(wide);
    thin.down({x.data(), columns, a_units.data(), width, r, 0.5f, kept.mask, s.data()}, 0, rows);
    std::vector<T> y = x, scaled(rows * columns), dx(rows * columns);
    thin.up({y.data(), columns, left.data(), r, b_units.data(), wide, kept.mask}, 0, rows);
    for (int64_t m = 0; m < rows; m += lora::kRowGrain)
        thin.outer(
            {x.data(), columns, left_units.data(), width, r, kept.mask, false, 0, columns, sums.data()}, m,
            std::min(m + lora::kRowGrain, rows));
    kernels.norms[int(dtype)]({x.data(), columns, left.data(), r, b_units.data(), wide, norms.data()}, 0,
                              rows);
    kernels.scale[int(dtype)].scale({x.data(), columns, g.data(), scaled.data()}, 0, rows);
    kernels.scale[int(dtype)].backward(
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
void try_row(const lora::Kernels& kernels, Dtype dtype, int64_t inner, int64_t outer) {
    const lora::RowKernels& row = kernels.row[int(dtype)];
    const std::vector<T> x = numbers<T>(inner), factor = numbers<T>(outer * inner);
    std::vector<float> wide(inner + 16), out(outer + 16);
    std::vector<T> to = numbers<T>(outer);
    const std::vector<T> before = to;
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

// A step of AdamW: rule 0, whose scalars optim/rules.h has.
void try_optim(const optim::Kernels& kernels, int64_t count) {
    const optim::Scalars scalars = {{1, 0.99f, 0.1f, 0.999f, 0.001f, -0.01f, 0.5f, 1e-8f}};
    std::vector<float> p = numbers<float>(count), m = numbers<float>(count), v(count);
    const std::vector<float> g = numbers<float>(count), was = p, first = m;
    for (float& value : v) value = std::fabs(number());
    const std::vector<float> second = v;
    void* state[] = {m.data(), v.data()};
    kernels.update[0](p.data(), g.data(), state, count, scalars);
    for (int64_t i = 0; i < count; ++i) {
        const double moment = first[i] + 0.1f * (double(g[i]) - first[i]);
        const double square = double(second[i]) * 0.999f + 0.001f * double(g[i]) * g[i];
        const double step = -0.01f * moment / (std::sqrt(square) / 0.5f + 1e-8f);
        close(p[i], double(was[i]) * 0.99f + step, 4 * std::fabs(was[i]), "adamw", i);
        close(v[i], square, square, "second moment", i);
    }
    for (Dtype dtype : {Dtype::kHalf, Dtype::kBFloat16}) {
        std::vector<uint16_t> narrow(count), random(count);
        std::vector<float> back(count);
        kernels.narrow(p.data(), count, dtype, narrow.data());
        kernels.widen(narrow.data(), dtype, count, back.data());
        kernels.narrow_stochastic(p.data(), count, dtype, random.data(), 7, 1, 0);
        for (int64_t i = 0; i < count; ++i) {
            const bool half = dtype == Dtype::kHalf;
            require(narrow[i] == (half ? from_float<Half>(p[i]).bits : from_float<BFloat16>(p[i]).bits),
                    "narrow", i);
            require(back[i] == (half ? to_float(Half{narrow[i]}) : to_float(BFloat16{narrow[i]})), "widen",
                    i);
        }
        note(narrow), note(random);
    }
    note(p), note(m), note(v);
    ++cases;
}

void try_all(const char* level, const nf4::Kernels& nf4, const lora::Kernels& lora,
             const optim::Kernels& optim) {
    digest = 1469598103934665603u;
    cases = 0;
    source.seed(1);
    for (int64_t blocksize : {32, 64, 4096})
        for (int64_t count : {1, 63, 2050, 8209}) {
            try_nf4<float>(nf4, Dtype::kFloat, count, blocksize);
            try_nf4<Half>(nf4, Dtype::kHalf, count, blocksize);
            try_nf4<BFloat16>(nf4, Dtype::kBFloat16, count, blocksize);
        }
    for (int64_t rows : {1, 7, 70})
        for (int64_t columns : {8, 75, 300})
            for (int64_t r : {1, 16, 33})
                for (bool drops : {false, true}) {
                    try_lora<float>(lora, Dtype::kFloat, rows, columns, r, drops);
                    try_lora<Half>(lora, Dtype::kHalf, rows, columns, r, drops);
                    try_lora<BFloat16>(lora, Dtype::kBFloat16, rows, columns, r, drops);
                }
    for (int64_t inner : {1, 19, 700})
        for (int64_t outer : {1, 21}) {
            try_row<float>(lora, Dtype::kFloat, inner, outer);
            try_row<Half>(lora, Dtype::kHalf, inner, outer);
            try_row<BFloat16>(lora, Dtype::kBFloat16, inner, outer);
        }
    for (int64_t count : {1, 256, 1031}) try_optim(optim, count);
    printf("%s: %d cases, %016llx\n", level, cases, (unsigned long long)digest);
}

}  // namespace

int main() {
    nf4::Kernels nf4;
    lora::Kernels lora{};
    optim::Kernels optim{};
    fill_portable(nf4);
    fill_portable(lora);
    fill_portable(optim);
    try_all("portable", nf4, lora, optim);
    return 0;
}
