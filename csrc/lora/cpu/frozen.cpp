#include "lora/cpu/frozen.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "gemm/cpu/few_rows/linear.h"
#include "nf4/cpu/dequantize.h"
#include "nf4/cpu/linear/linear.h"

namespace peftcore {
namespace lora {

Tensor frozen_linear(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias) {
    if (weight.packed()) return nf4::linear(x, weight.view(), contiguous(bias));
    return gemm::dense_linear(x, weight.first(), contiguous(bias));
}

Tensor frozen_linear_backward(const Tensor& dy, const Weight& weight) {
    return weight.packed() ? nf4::linear_backward(dy, weight.view()) : at::cpu::mm(dy, weight.first());
}

std::optional<gemm::Tiles> tiles_of(const CpuKernels& kernels, const Tensor& x, const Right& right) {
    const WeightView& view = right.view;
    if (x.scalar_type() != at::kBFloat16 || kernels.gemm.multiply == nullptr || x.numel() == 0 ||
        view.count() == 0 || (view.dense == nullptr && !right.packed()))
        return {};
    if (right.packed() && !nf4::has_tiles(kernels, view)) return {};
    const gemm::Tiles& transposed = right.packed() ? kernels.packed.transposed : kernels.dense.transposed;
    const gemm::Tiles& plain = right.packed() ? kernels.packed.plain : kernels.dense.plain;
    return (right.transposed ? transposed : plain).of(&view);
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

Right right_of(const Weight& weight, bool transposed) {
    if (weight.packed() || weight.first().is_contiguous()) return {weight.view(), transposed};
    return {{}, transposed};
}

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

}  // namespace

bool whole_product(const CpuKernels& kernels, const Tensor& x, const Right& right, const Tensor& bias,
                   const ThinProduct& thin, const Tensor& y) {
    if (!kernels.gemm.takes_addend) return false;
    // For few rows of x, linear_4bit has kernels of its own.
    if (right.packed() && x.size(0) <= kernels.linear.tile.max_batch[int(Dtype::kBFloat16)]) return false;
    const std::optional<gemm::Tiles> tiles = tiles_of(kernels, x, right);
    if (!tiles) return false;
    const int parts = parts_of(thin.left.size(1));
    const Tensor left = in_halves(kernels, thin.left, parts, true, false),
                 factor = in_halves(kernels, thin.right, parts, false, !right.transposed);
    const WeightView view = dense_view(factor);
    const gemm::Tiles& reader = right.transposed ? kernels.dense.transposed : kernels.dense.plain;
    gemm::multiply(kernels.gemm, {.x = bits(x),
                                  .right = *tiles,
                                  .rows = x.size(0),
                                  .inner = x.size(1),
                                  .columns = y.size(1),
                                  .bias = bias.defined() ? bits(bias) : nullptr,
                                  .y = static_cast<BFloat16*>(y.mutable_data_ptr()),
                                  .addend = {.left = bits(left),
                                             .right = reader.of(&view),
                                             .inner = left.size(1),
                                             .keep = thin.keep,
                                             .halves = parts == 2},
                                  .following = right.following});
    return true;
}

Tensor whole_linear(const CpuKernels& kernels, const Tensor& x, const Weight& weight,
                    const std::optional<Tensor>& bias, const Tensor& s, const Tensor& b) {
    if (!kernels.gemm.takes_addend || x.scalar_type() != at::kBFloat16) return {};
    const Tensor y = at::empty({x.size(0), weight.rows()}, x.options());
    const bool made = whole_product(kernels, x, right_of(weight, true), contiguous(bias), {s, b, {}}, y);
    return made ? y : Tensor();
}

Tensor whole_linear_backward(const CpuKernels& kernels, const Tensor& dy, const Weight& weight,
                             const Tensor& t, const Tensor& a, const Mask& keep) {
    if (!kernels.gemm.takes_addend || dy.scalar_type() != at::kBFloat16) return {};
    const Tensor dx = at::empty({dy.size(0), weight.columns()}, dy.options());
    return whole_product(kernels, dy, right_of(weight, false), {}, {t, a, keep}, dx) ? dx : Tensor();
}

}  // namespace lora
}  // namespace peftcore
