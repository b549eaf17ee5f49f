// Products in 16 bits, of many rows, by a dense weight and one in 4 bits, and by each transposed, with and without a
// low-rank product in the same sums; of few rows by a dense weight.
#include "checks.h"
#include "common/caches.h"

namespace peftcore {
namespace {

// y = x B + bias by multiply(x, bias, y), where value(k, n) is B's.
template <typename T, typename Value, typename Multiply>
void try_any(int64_t rows, int64_t inner, int64_t columns, const Value& value, const char* what,
             const Multiply& multiply) {
    const Values<T> x = numbers<T>(rows * inner), bias = numbers<T>(columns);
    Values<T> y(rows * columns);
    multiply(x.data(), rows % 2 ? bias.data() : nullptr, y.data());
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; ++n) {
            double sum = rows % 2 ? to_float(bias[n]) : 0, magnitude = std::fabs(sum);
            for (int64_t k = 0; k < inner; ++k) {
                const double product = to_float(x[m * inner + k]) * value(k, n);
                sum += product;
                magnitude += std::fabs(product);
            }
            close(y[m * columns + n], sum, magnitude, what, m * columns + n);
        }
    note(y);
    ++cases;
}

template <typename T, typename Value>
void try_product(const gemm::Kernel& kernel, const gemm::Tiles& right, int64_t rows, int64_t inner,
                 int64_t columns, const Value& value, const char* what) {
    try_any<T>(rows, inner, columns, value, what, [&](const T* x, const T* bias, T* y) {
        gemm::multiply(kernel, {.x = x,
                                .dtype = dtype_of<T>,
                                .right = right,
                                .rows = rows,
                                .inner = inner,
                                .columns = columns,
                                .bias = bias,
                                .y = y});
    });
}

// y = keep ∘ (left factor) where W is zero; kernels whose words are fp32.
template <typename T>
void try_addend(const gemm::ManyRows& products, int64_t rows, int64_t out, int64_t in, int64_t r,
                bool masked) {
    if (left_out()) return;
    const Values<T> w(out * in, from_float<T>(0)), x = numbers<T>(rows * in);
    const Values<float> left = numbers<float>(rows * r), factor = numbers<float>(out * r);
    const int64_t mask_bytes = filled_up(ceil_div(out, 8), 4);
    Values<uint8_t> keep(rows * mask_bytes);
    for (uint8_t& byte : keep) byte = uint8_t(source() >> 8);
    Values<T> y(rows * out);
    WeightView view, factor_view;
    view.rows = factor_view.rows = out;
    view.columns = in;
    factor_view.columns = r;
    view.dense = w.data();
    factor_view.dense = factor.data();
    gemm::multiply(products.kernel, {.x = x.data(),
                                     .dtype = dtype_of<T>,
                                     .right = products.dense.transposed.bind(&view),
                                     .rows = rows,
                                     .inner = in,
                                     .columns = out,
                                     .y = y.data(),
                                     .addend = {.left = left.data(),
                                                .right = products.factor.transposed.bind(&factor_view),
                                                .inner = r,
                                                .keep = {masked ? keep.data() : nullptr, mask_bytes}}});
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < out; ++n) {
            double sum = 0, magnitude = 0;
            for (int64_t i = 0; i < r; ++i) {
                const double product = double(left[m * r + i]) * factor[n * r + i];
                sum += product;
                magnitude += std::fabs(product);
            }
            const bool kept = !masked || (keep[m * mask_bytes + n / 8] >> n % 8 & 1);
            close(y[m * out + n], kept ? sum : 0, magnitude, "addend", m * out + n);
        }
    note(y);
    ++cases;
}

template <typename T>
void try_skinny(const gemm::SkinnyKernel& kernel, int64_t rows, int64_t out, int64_t in) {
    if (left_out()) return;
    const Values<T> w = numbers<T>(out * in);
    const auto at = [&](int64_t k, int64_t n) { return double(to_float(w[n * in + k])); };
    try_any<T>(rows, in, out, at, "few rows", [&](const T* x, const T* bias, T* y) {
        const gemm::SkinnyProduct args{
            .x = x, .batch = rows, .inner = in, .w = w.data(), .columns = out, .bias = bias, .y = y};
        kernel.run(args, {0, out / 2});
        kernel.run(args, {out / 2, out});
    });
}

template <typename T>
void try_all_skinny(const gemm::SkinnyKernel& kernel) {
    for (int64_t rows = 1; rows <= kernel.max_batch; ++rows)
        for (int64_t out : {1, 31})
            for (int64_t in : {3, 64, 77}) try_skinny<T>(kernel, rows, out, in);
}

template <typename T>
void try_dense(const gemm::ManyRows& products, int64_t rows, int64_t out, int64_t in) {
    if (left_out()) return;
    const Values<T> w = numbers<T>(out * in);
    WeightView view;
    view.rows = out;
    view.columns = in;
    view.dense = w.data();
    const auto at = [&](int64_t n, int64_t k) { return double(to_float(w[n * in + k])); };
    try_product<T>(
        products.kernel, products.dense.transposed.bind(&view), rows, in, out,
        [&](int64_t k, int64_t n) { return at(n, k); }, "dense, transposed");
    try_product<T>(products.kernel, products.dense.plain.bind(&view), rows, out, in, at, "dense");
}

template <typename T>
void try_packed(const gemm::ManyRows& products, int64_t rows, int64_t out, int64_t in, int64_t blocksize,
                bool nested) {
    if (left_out()) return;
    const Packed packed(out, in, blocksize, nested ? ScaleKind::kNested : ScaleKind::kFloat);
    const auto at = [&](int64_t n, int64_t k) {
        const int64_t i = n * in + k;
        const float value = kCode[packed.code(i)] * packed.scale(i);
        return double(products.kernel.word_values == 1 ? value : to_float(from_float<BFloat16>(value)));
    };
    try_product<T>(
        products.kernel, products.packed.transposed.bind(&packed.view), rows, in, out,
        [&](int64_t k, int64_t n) { return at(n, k); }, "packed, transposed");
    try_product<T>(products.kernel, products.packed.plain.bind(&packed.view), rows, out, in, at, "packed");
}

template <typename T>
void try_many_rows(const gemm::ManyRows& products) {
    if (products.kernel.multiply == nullptr) return;
    for (int64_t rows : {1, 12, 29, 110}) {
        for (int64_t out : {1, 31, 130})
            for (int64_t in : {3, 64, 77}) try_dense<T>(products, rows, out, in);
        for (int64_t out : {1, 37, 160})
            for (int64_t in : {64, 192})
                try_packed<T>(products, rows, out, in, rows % 2 ? 64 : 4096, out % 2 != 0);
    }
    try_dense<T>(products, 5, 1030, 1100);
    try_packed<T>(products, 13, 70, 1152, 64, true);
    try_packed<T>(products, 14, 1090, 64, 128, false);
    if (products.kernel.word_values != 1) return;
    for (int64_t rows : {1, 7, 29})  // shapes that no register divides, and blocks of 32
        for (int64_t in : {9, 65, 96}) try_packed<T>(products, rows, 21, in, in == 96 ? 32 : 64, rows == 7);
    for (bool masked : {false, true})
        for (int64_t in : {40, 1100}) try_addend<T>(products, 29, 77, in, 5, masked);
}

}  // namespace

void try_gemm(const CpuKernels& kernels) {
    try_all_skinny<Half>(kernels.skinny[int(Dtype::kHalf)]);
    try_all_skinny<BFloat16>(kernels.skinny[int(Dtype::kBFloat16)]);
    const Caches before = caches();
    set_caches(
        {.first = kSmallestFirst, .second = kSmallestSecond, .third = 2 << 20});  // several chunks, of 512
    try_many_rows<Half>(kernels.many_rows[int(Dtype::kHalf)]);
    try_many_rows<BFloat16>(kernels.many_rows[int(Dtype::kBFloat16)]);
    set_caches(before);
}

}  // namespace peftcore
