// lora_linear and its gradient on CPU. Schemas and formulas: peftcore/ops/lora.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "cpu/kernels.h"
#include "lora/cpu/frozen.h"
#include "lora/cpu/skinny.h"
#include "lora/cpu/thin.h"

namespace peftcore {
namespace lora {
namespace {

// s = factor x aᵀ, and y of few rows.
Tensor skinny_linear(const CpuKernels& kernels, const Tensor& x, const Weight& weight,
                     const std::optional<Tensor>& bias, const Tensor& a, const Tensor& b, float factor,
                     const Tensor& s) {
    const Tensor added = contiguous(bias), plain_a = plain_factor(a), plain_b = plain_factor(b);
    Tensor y;
    if (weight.packed()) {
        y = at::empty({x.size(0), weight.rows()}, x.options());
        const SkinnyLora lora(kernels.lora, x, plain_a, plain_b, factor, s, y);
        LoraCompanion companion(lora);
        const quant4::DirectLinear call{.x = x.const_data_ptr(),
                                        .rows = x.size(0),
                                        .bias = added.defined() ? added.const_data_ptr() : nullptr,
                                        .y = y.mutable_data_ptr(),
                                        .dtype = kernel_dtype(x.scalar_type(), "lora_linear"),
                                        .companion = &companion};
        if (quant4::linear_direct(kernels, call, weight.view())) {
            companion.finish();
            return y;
        }
    }
    y = frozen_linear(x, weight, bias);
    const SkinnyLora lora(kernels.lora, x, plain_a, plain_b, factor, s, y);
    lora.down_all();
    lora.up_all();
    return y;
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, at::TensorList tensors, at::IntArrayRef packing,
                                       const std::optional<Tensor>& bias, const Tensor& a, const Tensor& b,
                                       double scale, double dropout_p, const std::optional<Tensor>& seed) {
    const char* op = "lora_linear";
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Weight weight(tensors, packing, op);
    check_linear(x, weight, bias, op);
    check_factors(operand(x), a, b, weight.rows(), op);
    const int64_t r = a.size(0);
    const Dropout dropout = checked_dropout(dropout_p, seed, op);
    const Tensor flat = matrix(x);
    const Tensor s = at::empty({flat.size(0), r}, x.options().dtype(at::kFloat));
    const CpuKernels& kernels = cpu_kernels();
    const ThinKernels& thin = kernels.lora.thin[int(kernel_dtype(x.scalar_type(), op))];
    Tensor y;
    // Where the low-rank product can join a dense one (frozen.h), arranged factors are faster from fewer rows on.
    const gemm::ManyRows& products = many_rows(kernels, x);
    const bool joins =
        products.kernel.takes_addend && !weight.packed() && flat.size(0) >= products.least_rows;
    const int64_t arrange_from = joins ? kArrangeEachFrom : kArrangeFrom;
    if (flat.size(0) < arrange_from && dropout.threshold == 0 &&
        s.numel() * weight.rows() * weight.columns() != 0) {
        y = skinny_linear(kernels, flat, weight, bias, a, b, float(scale), s);
    } else if (s.numel() != 0) {
        const KeepMask keep = keep_mask(thin, dropout, flat);
        const Factor right = arranged_factor(thin.arrangement, floats(a), true);
        down(thin, down_args(flat, right, dropout_factor(scale, dropout), keep.mask, s), flat.size(0));
        y = whole_linear(kernels, flat, weight, bias, s, floats(b));
    }
    if (!y.defined()) {
        y = frozen_linear(flat, weight, bias);
        if (s.numel() != 0 && y.numel() != 0)
            up(thin, y, s, arranged_factor(thin.plain, floats(b), true), {});
    }
    return {y.view(with_last(x, weight.rows())), s};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& s,
                                                        at::TensorList tensors, at::IntArrayRef packing,
                                                        const Tensor& a, const Tensor& b,
                                                        std::array<bool, 3> needs, double scale,
                                                        double dropout_p, const std::optional<Tensor>& seed) {
    const char* op = "lora_linear_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Weight weight(tensors, packing, op);
    check_linear(x, weight, {}, op);
    check_factors(operand(x), a, b, weight.rows(), op);
    const int64_t r = a.size(0), columns = weight.columns(), out_features = weight.rows();
    check_gradient(grad, s, x, out_features, r, op);
    const Dropout dropout = checked_dropout(dropout_p, seed, op);
    const Tensor flat = matrix(x), rows = matrix(grad);
    const int64_t count = flat.size(0);
    const bool nothing = count == 0 || r == 0 || columns == 0 || out_features == 0;
    const auto gradient = [&](bool needed, at::IntArrayRef shape) {
        const Tensor result = at::empty(needed ? shape : at::IntArrayRef{0}, x.options().dtype(at::kFloat));
        return nothing ? result.zero_() : result;
    };
    const Tensor da = gradient(needs[1], a.sizes()), db = gradient(needs[2], b.sizes());
    Tensor dx = at::empty({0}, x.options());
    if (nothing) {
        if (needs[0]) dx = frozen_linear_backward(rows, weight);
    } else {
        const CpuKernels& kernels = cpu_kernels();
        const ThinKernels& thin = kernels.lora.thin[int(kernel_dtype(x.scalar_type(), op))];
        const Tensor t = at::empty({count, r}, s.options());
        const KeepMask keep = thin_backward(thin, {.dy = rows,
                                                   .x = flat,
                                                   .s = s,
                                                   .b = b,
                                                   .needs = needs,
                                                   .scale = scale,
                                                   .dropout = dropout,
                                                   .first_row = 0,
                                                   .t = t,
                                                   .da = da,
                                                   .db = db});
        if (needs[0]) {
            const Tensor factor = floats(a);
            dx = whole_linear_backward(kernels, rows, weight, t, factor, keep.mask);
            if (!dx.defined()) {
                dx = frozen_linear_backward(rows, weight);
                up(thin, dx, t, arranged_factor(thin.plain, factor, false), keep.mask);
            }
        }
    }
    if (needs[0]) dx = dx.view(x.sizes());
    return {dx, da.to(a.scalar_type()), db.to(b.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("lora_linear", &lora_linear);
    m.impl("lora_linear_backward", &lora_linear_backward);
}

}  // namespace lora
}  // namespace peftcore
