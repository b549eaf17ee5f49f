#include "lora/cpu/skinny.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "common/check.h"

namespace peftcore {
namespace lora {
namespace {

constexpr int64_t kFactorProductsPerTask = 1 << 15;  // fewer than kProductsPerTask: factors come from memory

const RowKernels& row_kernels(const Kernels& kernels, const Tensor& like) {
    return kernels.row[int(kernel_dtype(like.scalar_type(), "lora_linear"))];
}

const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

}  // namespace

Tensor plain_factor(const Tensor& factor) {
    return factor.scalar_type() == at::kDouble ? floats(factor) : factor.contiguous();
}

SkinnyLora::SkinnyLora(const Kernels& kernels, const Tensor& x, const Tensor& a, const Tensor& b,
                       float factor, const Tensor& s, const Tensor& y)
    : x_kernels_(row_kernels(kernels, x)),
      a_kernels_(row_kernels(kernels, a)),
      b_kernels_(row_kernels(kernels, b)),
      y_kernels_(row_kernels(kernels, y)),
      rows_(x.size(0)),
      inner_(x.size(1)),
      columns_(y.size(1)),
      r_(s.size(1)),
      a_row_(inner_ * a.element_size()),
      b_row_(r_ * b.element_size()),
      y_item_(y.element_size()),
      factor_(factor),
      x_(bytes(x)),
      a_(bytes(a)),
      b_(bytes(b)),
      y_(static_cast<char*>(y.mutable_data_ptr())),
      s_(s.mutable_data_ptr<float>()) {}

// A row of A stays in the L1 cache while all rows of x are multiplied by it.
void SkinnyLora::down(int64_t piece) const {
    std::vector<float> a(size_t(inner_ + kRowPadding)), sums(size_t(rows_ + kRowPadding));
    const int64_t first = piece * kOutputs, last = std::min(first + kOutputs, r_);
    for (int64_t i = first; i < last; ++i) {
        a_kernels_.widen(a_ + i * a_row_, inner_, a.data());
        x_kernels_.multiply(a.data(), x_, inner_, rows_, sums.data());
        for (int64_t m = 0; m < rows_; ++m) s_[m * r_ + i] = factor_ * sums[size_t(m)];
    }
}

void SkinnyLora::up(Range columns) const {
    float delta[kUpOutputs + kRowPadding];
    std::vector<float> s(size_t(rows_ * (r_ + kRowPadding)));
    for (int64_t m = 0; m < rows_; ++m) std::copy_n(s_ + m * r_, r_, s.data() + m * (r_ + kRowPadding));
    for (int64_t n = columns.first; n < columns.last; n += kUpOutputs) {
        const int64_t count = std::min(kUpOutputs, columns.last - n);
        for (int64_t m = 0; m < rows_; ++m) {
            b_kernels_.multiply(s.data() + m * (r_ + kRowPadding), b_ + n * b_row_, r_, count, delta);
            y_kernels_.add(delta, count, y_ + (m * columns_ + n) * y_item_);
        }
    }
}

void SkinnyLora::down_all() const {
    at::parallel_for(0, down_pieces(), ceil_div(kFactorProductsPerTask, kOutputs * inner_ * rows_),
                     [&](int64_t first, int64_t last) {
                         for (; first < last; ++first) down(first);
                     });
}

void SkinnyLora::up_all() const {
    at::parallel_for(0, ceil_div(columns_, kUpOutputs),
                     ceil_div(kFactorProductsPerTask, kUpOutputs * r_ * rows_),
                     [&](int64_t first, int64_t last) {
                         up({first * kUpOutputs, std::min(last * kUpOutputs, columns_)});
                     });
}

void LoraCompanion::before() {
    for (int64_t piece; (piece = next_.fetch_add(1)) < lora_.down_pieces(); done_.fetch_add(1))
        lora_.down(piece);
}

void LoraCompanion::after(Range rows) {
    if (done_.load() == lora_.down_pieces()) return lora_.up(rows);
    const std::lock_guard<std::mutex> lock(mutex_);
    left_.push_back(rows);
}

void LoraCompanion::finish() const {
    for (const Range& rows : left_) lora_.up(rows);
}

}  // namespace lora
}  // namespace peftcore
