#include "lora/cpu/base.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "nf4/cpu/dequantize.h"

namespace peftcore {
namespace lora {

Tensor base(const Tensor& x, const Base& of, const std::optional<Tensor>& bias) {
    if (of.quantized.packed()) return packed_linear(x, of.weight, bias, of.out_features, of.quantized);
    return bias.has_value() ? at::cpu::addmm(*bias, x, of.weight.t()) : at::cpu::mm(x, of.weight.t());
}

Tensor base_backward(const Tensor& dy, const Base& of) {
    if (of.quantized.packed()) return packed_linear_backward(dy, of.weight, of.in_features, of.quantized);
    return at::cpu::mm(dy, of.weight);
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
    Right(const CpuKernels& kernels, const Tensor& x, const Base& base) {
        if (x.scalar_type() != at::kBFloat16 || x.numel() == 0 || base.in_features * base.out_features == 0 ||
            !kernels.gemm.takes_addend)
            return;
        const Quantized& q = base.quantized;
        if (q.packed()) {
            TORCH_CHECK_VALUE(q.code.has_value(), base.op,
                              ": a packed weight needs absmax and code, found no code");
            // For few rows of x, linear_4bit has kernels of its own.
            if (x.size(0) <= kernels.linear.tile.max_batch[int(Dtype::kBFloat16)]) return;
            arguments_ = nf4::packed_arguments(base.weight, *q.absmax, *q.code, q.blocksize, q.nested_absmax,
                                               q.nested_code, q.nested_offset, q.nested_blocksize,
                                               base.out_features * base.in_features, base.op);
            view_ = nf4::view_of(arguments_, base.in_features);
            if (!nf4::has_tiles(kernels, view_)) return;
            transposed_ = &kernels.packed.transposed;
            plain_ = &kernels.packed.plain;
        } else if (base.weight.is_contiguous()) {
            view_ = dense_view(base.weight);
            transposed_ = &kernels.dense.transposed;
            plain_ = &kernels.dense.plain;
        }
    }
    Right(const Right&) = delete;

    bool known() const { return plain_ != nullptr; }
    gemm::Tiles transposed() const { return transposed_->of(&view_); }
    gemm::Tiles plain() const { return plain_->of(&view_); }

 private:
    nf4::Packed arguments_;
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

Tensor joined(const CpuKernels& kernels, const Tensor& x, const Base& of, const std::optional<Tensor>& bias,
              const Tensor& s, const Tensor& b) {
    const Right right(kernels, x, of);
    if (!right.known()) return {};
    const Tensor y = at::empty({x.size(0), of.out_features}, x.options());
    gemm::Product all = product(x, right.transposed(), bias.has_value() ? bias->contiguous() : Tensor(), y);
    const int parts = parts_of(s.size(1));
    const Tensor left = in_halves(kernels, s, parts, true, false),
                 right_parts = in_halves(kernels, b, parts, false, false);
    const WeightView factor = dense_view(right_parts);
    all.addend = {bits(left), kernels.dense.transposed.of(&factor), left.size(1), {}, parts == 2};
    gemm::multiply(kernels.gemm, all);
    return y;
}

Tensor joined_backward(const CpuKernels& kernels, const Tensor& dy, const Base& of, const Tensor& t,
                       const Tensor& a, const Mask& keep) {
    const Right right(kernels, dy, of);
    if (!right.known()) return {};
    const Tensor dx = at::empty({dy.size(0), of.in_features}, dy.options());
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
