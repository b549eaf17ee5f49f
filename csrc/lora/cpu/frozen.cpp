#include "lora/cpu/frozen.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "gemm/cpu/matrices.h"
#include "gemm/cpu/skinny/linear.h"
#include "quant4/cpu/linear/linear.h"

namespace peftcore {
namespace lora {

Tensor frozen_linear(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias) {
    if (weight.packed()) return quant4::linear(x, weight.view(), contiguous(bias));
    return gemm::dense_linear(x, weight.first(), contiguous(bias));
}

Tensor frozen_linear_backward(const Tensor& dy, const Weight& weight) {
    return weight.packed() ? quant4::linear_backward(dy, weight.view())
                           : gemm::dense_linear(dy, weight.first().t(), {});
}

const gemm::ManyRows& many_rows(const CpuKernels& kernels, const Tensor& x) {
    return kernels.many_rows[int(kernel_dtype(x.scalar_type(), "linear"))];
}

std::optional<gemm::Tiles> tiles_of(const CpuKernels& kernels, const Tensor& x, const Right& right) {
    if (x.numel() == 0 || (!right.packed() && x.size(0) < many_rows(kernels, x).least_rows)) return {};
    return gemm::tiles_of(many_rows(kernels, x), right.view, right.transposed);
}

namespace {

Right right_of(const Weight& weight, bool transposed) {
    if (weight.packed() || weight.first().is_contiguous()) return {weight.view(), transposed};
    const Tensor turned = weight.first().t();
    if (turned.is_contiguous()) return {gemm::view_of(turned), !transposed};
    return {{}, transposed};
}

// Halves that are whole tiles are multiplied directly: y takes 0.9 of the time of three parts (1024 rows, 576 -> 1536,
// r = 64). Shorter halves would take three tiles, where three parts fill one or two.
int parts_of(int64_t r) { return r % gemm::kHalfMultiple == 0 ? 2 : 3; }

// The parts of a factor (see Halves), concatenated along either dimension.
Tensor in_halves(const CpuKernels& kernels, const Tensor& from, int parts, bool left, bool below) {
    const int64_t rows = from.size(0), columns = from.size(1);
    const Tensor out = at::empty({below ? parts * rows : rows, below ? columns : parts * columns},
                                 from.options().dtype(at::kBFloat16));
    kernels.lora.thin[int(Dtype::kBFloat16)].halves({.from = from.const_data_ptr<float>(),
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
    const gemm::ManyRows& products = many_rows(kernels, x);
    if (!products.kernel.takes_addend) return false;
    // linear_4bit has separate kernels for few rows of x.
    const Dtype dtype = kernel_dtype(x.scalar_type(), "linear");
    if (right.packed() && quant4::has_direct_kernel(kernels, right.view, dtype, x.size(0))) return false;
    const std::optional<gemm::Tiles> tiles = tiles_of(kernels, x, right);
    if (!tiles) return false;
    gemm::Product product = gemm::product_of(x, *tiles, bias, y);
    product.following = right.following;
    Tensor left = thin.left, factor = thin.right;
    if (products.kernel.word_values == 2) {
        const int parts = parts_of(left.size(1));
        left = in_halves(kernels, left, parts, true, false);
        factor = in_halves(kernels, factor, parts, false, !right.transposed);
        product.addend.halves = parts == 2;
    }
    const WeightView view = gemm::view_of(factor);
    const gemm::Tiles& reader = right.transposed ? products.factor.transposed : products.factor.plain;
    product.addend.left = left.const_data_ptr();
    product.addend.right = reader.bind(&view);
    product.addend.inner = left.size(1);
    product.addend.keep = thin.keep;
    gemm::multiply(products.kernel, product);
    return true;
}

namespace {

// The product with a weight; `for_transposed`: the factor has the layout of Wᵀ as right operand, else that of W.
Tensor whole(const CpuKernels& kernels, const Tensor& x, const Right& right, int64_t columns,
             const Tensor& bias, const Tensor& left, const Tensor& factor, const Mask& keep,
             bool for_transposed) {
    if (!many_rows(kernels, x).kernel.takes_addend) return {};
    const Tensor y = at::empty({x.size(0), columns}, x.options());
    const Tensor arranged = right.transposed == for_transposed ? factor : factor.t().contiguous();
    return whole_product(kernels, x, right, bias, {left, arranged, keep}, y) ? y : Tensor();
}

}  // namespace

Tensor whole_linear(const CpuKernels& kernels, const Tensor& x, const Weight& weight,
                    const std::optional<Tensor>& bias, const Tensor& s, const Tensor& b) {
    return whole(kernels, x, right_of(weight, true), weight.rows(), contiguous(bias), s, b, {}, true);
}

Tensor whole_linear_backward(const CpuKernels& kernels, const Tensor& dy, const Weight& weight,
                             const Tensor& t, const Tensor& a, const Mask& keep) {
    return whole(kernels, dy, right_of(weight, false), weight.columns(), {}, t, a, keep, false);
}

}  // namespace lora
}  // namespace peftcore
