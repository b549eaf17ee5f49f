#include "lora/cpu/frozen.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "nf4/cpu/dequantize.h"
#include "nf4/cpu/linear/linear.h"

namespace peftcore {
namespace lora {

Tensor frozen_linear(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias) {
    if (weight.packed()) return nf4::linear(x, weight.view(), contiguous(bias));
    const Tensor transposed = weight.first().t();
    return bias.has_value() ? at::cpu::addmm(*bias, x, transposed) : at::cpu::mm(x, transposed);
}

Tensor frozen_linear_backward(const Tensor& dy, const Weight& weight) {
    return weight.packed() ? nf4::linear_backward(dy, weight.view()) : at::cpu::mm(dy, weight.first());
}

namespace {

const BFloat16* bits(const Tensor& t) { return static_cast<const BFloat16*>(t.const_data_ptr()); }

WeightView dense_view(const Tensor& matrix) {
    WeightView view;
    view.rows = matrix.size(0);
    view.columns = matrix.size(1);
    view.dense = matrix.const_data_ptr();
    return view;
}

// W as gemm::multiply reads it.
class Right {
 public:
    Right(const CpuKernels& kernels, const Tensor& x, const Weight& weight) {
        if (x.scalar_type() != at::kBFloat16 || x.numel() == 0 || weight.rows() * weight.columns() == 0 ||
            !kernels.gemm.takes_addend)
            return;
        if (weight.packed()) {
            // For few rows of x, linear_4bit has kernels of its own.
            if (x.size(0) <= kernels.linear.tile.max_batch[int(Dtype::kBFloat16)]) return;
            view_ = weight.view();
            if (!nf4::has_tiles(kernels, view_)) return;
            transposed_ = &kernels.packed.transposed;
            plain_ = &kernels.packed.plain;
        } else if (weight.first().is_contiguous()) {
            view_ = weight.view();
            transposed_ = &kernels.dense.transposed;
            plain_ = &kernels.dense.plain;
        }
    }
    Right(const Right&) = delete;

    bool known() const { return plain_ != nullptr; }
    gemm::Tiles transposed() const { return transposed_->of(&view_); }
    gemm::Tiles plain() const { return plain_->of(&view_); }

 private:
    WeightView view_;
    const gemm::Tiles *transposed_ = nullptr, *plain_ = nullptr;
};

// Halves that are whole tiles are multiplied as they are: y takes 0.9 of the time of three parts (1024 rows,
// 576 -> 1536, r = 64). Shorter ones would cost three tiles, where three parts fill one or two.
int parts_of(int64_t r) { return r % gemm::kHalfMultiple == 0 ? 2 : 3; }

// The parts of a factor (see Halves), beside one another or one below the other.
Tensor in_halves(const CpuKernels& kernels, const Tensor& from, int parts, bool left, bool below) {
    const int64_t rows = from.size(0), columns = from.size(1);
    const Tensor out = at::empty({below ? parts * rows : rows, below ? columns : parts * columns},
                                 from.options().dtype(at::kBFloat16));
    kernels.lora.halves({.from = from.const_data_ptr<float>(),
                         .rows = rows,
                         .columns = columns,
                         .parts = parts,
                         .left = left,
                         .row_stride = out.size(1),
                         .part_stride = below ? rows * columns : columns,
                         .out = static_cast<BFloat16*>(out.mutable_data_ptr())});
    return out;
}

gemm::Product product(const Tensor& x, const gemm::Tiles& right, const Tensor& bias, const Tensor& y) {
    return {.x = bits(x),
            .right = right,
            .rows = x.size(0),
            .inner = x.size(1),
            .columns = y.size(1),
            .bias = bias.defined() ? bits(bias) : nullptr,
            .y = static_cast<BFloat16*>(y.mutable_data_ptr())};
}

}  // namespace

Tensor whole_linear(const CpuKernels& kernels, const Tensor& x, const Weight& weight,
                    const std::optional<Tensor>& bias, const Tensor& s, const Tensor& b) {
    const Right right(kernels, x, weight);
    if (!right.known()) return {};
    const Tensor y = at::empty({x.size(0), weight.rows()}, x.options());
    gemm::Product all = product(x, right.transposed(), contiguous(bias), y);
    const int parts = parts_of(s.size(1));
    const Tensor left = in_halves(kernels, s, parts, true, false),
                 right_parts = in_halves(kernels, b, parts, false, false);
    const WeightView factor = dense_view(right_parts);
    all.addend = {bits(left), kernels.dense.transposed.of(&factor), left.size(1), {}, parts == 2};
    gemm::multiply(kernels.gemm, all);
    return y;
}

Tensor whole_linear_backward(const CpuKernels& kernels, const Tensor& dy, const Weight& weight,
                             const Tensor& t, const Tensor& a, const Mask& keep) {
    const Right right(kernels, dy, weight);
    if (!right.known()) return {};
    const Tensor dx = at::empty({dy.size(0), weight.columns()}, dy.options());
    gemm::Product all = product(dy, right.plain(), {}, dx);
    const int parts = parts_of(t.size(1));
    const Tensor left = in_halves(kernels, t, parts, true, false),
                 right_parts = in_halves(kernels, a, parts, false, true);
    const WeightView factor = dense_view(right_parts);
    all.addend = {bits(left), kernels.dense.plain.of(&factor), left.size(1), keep, parts == 2};
    gemm::multiply(kernels.gemm, all);
    return dx;
}

}  // namespace lora
}  // namespace peftcore
