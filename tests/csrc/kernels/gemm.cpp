// Products in bf16, of many rows, by a dense weight and one in 4 bits, and by each transposed; of few rows by
// a dense weight.
#include "checks.h"
#include "common/caches.h"

namespace peftcore {
namespace {

// y = x B + bias by multiply(x, bias, y), where value(k, n) is B's.
template <typename Value, typename Multiply>
void try_any(int64_t rows, int64_t inner, int64_t columns, const Value& value, const char* what,
             const Multiply& multiply) {
    const Values<BFloat16> x = numbers<BFloat16>(rows * inner), bias = numbers<BFloat16>(columns);
    Values<BFloat16> y(rows * columns);
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

template <typename Value>
void try_product(const gemm::Kernel& kernel, const gemm::Tiles& right, int64_t rows, int64_t inner,
                 int64_t columns, const Value& value, const char* what) {
    try_any(rows, inner, columns, value, what, [&](const BFloat16* x, const BFloat16* bias, BFloat16* y) {
        gemm::multiply(
            kernel,
            {.x = x, .right = right, .rows = rows, .inner = inner, .columns = columns, .bias = bias, .y = y});
    });
}

void try_few_rows(const gemm::FewRowsKernel& kernel, int64_t rows, int64_t out, int64_t in) {
    const Values<BFloat16> w = numbers<BFloat16>(out * in);
    const auto at = [&](int64_t k, int64_t n) { return double(to_float(w[n * in + k])); };
    try_any(rows, in, out, at, "few rows", [&](const BFloat16* x, const BFloat16* bias, BFloat16* y) {
        const gemm::FewRows args{
            .x = x, .batch = rows, .inner = in, .w = w.data(), .columns = out, .bias = bias, .y = y};
        kernel.run(args, {0, out / 2});
        kernel.run(args, {out / 2, out});
    });
}

void try_dense(const CpuKernels& kernels, int64_t rows, int64_t out, int64_t in) {
    const Values<BFloat16> w = numbers<BFloat16>(out * in);
    WeightView view;
    view.rows = out;
    view.columns = in;
    view.dense = w.data();
    const auto at = [&](int64_t n, int64_t k) { return double(to_float(w[n * in + k])); };
    try_product(
        kernels.gemm, kernels.dense.transposed.of(&view), rows, in, out,
        [&](int64_t k, int64_t n) { return at(n, k); }, "dense, transposed");
    try_product(kernels.gemm, kernels.dense.plain.of(&view), rows, out, in, at, "dense");
}

void try_packed(const CpuKernels& kernels, int64_t rows, int64_t out, int64_t in, int64_t blocksize,
                bool nested) {
    const Packed packed(out, in, blocksize, nested);
    const auto at = [&](int64_t n, int64_t k) {
        const int64_t i = n * in + k;
        return double(to_float(from_float<BFloat16>(kCode[packed.code(i)] * packed.scale(i))));
    };
    try_product(
        kernels.gemm, kernels.packed.transposed.of(&packed.view), rows, in, out,
        [&](int64_t k, int64_t n) { return at(n, k); }, "packed, transposed");
    try_product(kernels.gemm, kernels.packed.plain.of(&packed.view), rows, out, in, at, "packed");
}

}  // namespace

void try_gemm(const CpuKernels& kernels) {
    for (int64_t rows = 1; rows <= kernels.few_rows.max_batch; ++rows)
        for (int64_t out : {1, 31})
            for (int64_t in : {3, 64, 77}) try_few_rows(kernels.few_rows, rows, out, in);
    if (kernels.gemm.multiply == nullptr) return;
    const Caches before = caches();
    set_caches(
        {.first = kSmallestFirst, .second = kSmallestSecond, .third = 2 << 20});  // several chunks, of 512
    for (int64_t rows : {1, 12, 29, 110}) {
        for (int64_t out : {1, 31, 130})
            for (int64_t in : {3, 64, 77}) try_dense(kernels, rows, out, in);
        for (int64_t out : {1, 37, 160})
            for (int64_t in : {64, 192})
                try_packed(kernels, rows, out, in, rows % 2 ? 64 : 4096, out % 2 != 0);
    }
    try_dense(kernels, 5, 1030, 1100);
    try_packed(kernels, 13, 70, 1152, 64, true);
    try_packed(kernels, 14, 1090, 64, 128, false);
    set_caches(before);
}

}  // namespace peftcore
