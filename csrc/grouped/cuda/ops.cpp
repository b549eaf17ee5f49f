// grouped_linear and its gradient on CUDA. Schemas and formulas: peftcore/ops/grouped_operators.py. Blocks read the
// offsets on the device. So does PyTorch's product of bf16 on compute capability 9.0 and above; its others wait for them.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "common/alignment.h"
#include "common/cuda_stream.h"
#include "common/cuda_support.h"
#include "common/tensors.h"
#include "grouped/arguments.h"
#include "grouped/cuda/grouped_cuda.h"
#include "quant4/cuda/linear.h"

namespace peftcore {
namespace grouped {
namespace {

// Arguments shared by an operator's launches, and launchers that take tensors.
class Call {
 public:
    Call(const Tensor& offsets, const Tensor& t, const char* op)
        : offsets_(offsets.contiguous()),
          groups_{offsets_.const_data_ptr<int32_t>(), offsets_.numel(), t.size(0)},
          stream_(current_cuda_stream(t.device())),
          op_(op) {}

    // wide W + bias + keep ∘ (thin Fᵀ), for a contiguous W stored as [columns, inner], or across; undefined tensors are
    // left out. Many rows are PyTorch's product, with W unpacked.
    Tensor product(const Tensor& wide, const Weight& weight, bool across, const Tensor& bias,
                   const Tensor& thin, const Tensor& factor, const Dropout& dropout) const {
        const int64_t inner = wide.size(1), columns = weight.sizes()[across ? 2 : 1];
        const void* const added = bias.defined() ? bias.const_data_ptr() : nullptr;
        const float* const left = thin.defined() ? thin.const_data_ptr<float>() : nullptr;
        const float* const right = thin.defined() ? factor.const_data_ptr<float>() : nullptr;
        const int rank = thin.defined() ? int(thin.size(1)) : 0;
        if (weight.packed() && !across && dropout.threshold == 0) {
            const Tensor out = at::empty({wide.size(0), columns}, wide.options());
            const Skinny few = {groups_,
                                dtype_of(wide),
                                wide.const_data_ptr(),
                                out.mutable_data_ptr(),
                                inner,
                                columns,
                                weight.view(),
                                added,
                                left,
                                right,
                                rank};
            if (peftcore_grouped_is_skinny(&few)) {
                check_launch(peftcore_grouped_skinny(&few, stream_), op_);
                return out;
            }
        }
        Tensor out;
        if (wide.numel() == 0 || weight.sizes()[0] * columns == 0) {
            out = at::zeros({wide.size(0), columns}, wide.options());
        } else {
            const Tensor dense = quant4::dense_weight(weight, wide);
            out = at::_grouped_mm(wide, across ? dense : dense.transpose(1, 2), offsets_).contiguous();
        }
        const Up rest = {groups_, dtype_of(out),         columns, added, left, right, rank,
                         dropout, out.mutable_data_ptr()};
        check_launch(peftcore_grouped_up(&rest, stream_), op_);
        return out;
    }

    // scale (keep ∘ wide) Fᵀ.
    Tensor down(const Tensor& wide, const Tensor& factor, bool across, float scale,
                const Dropout& dropout) const {
        const int64_t rank = factor.size(across ? 2 : 1);
        const Tensor out = at::empty({wide.size(0), rank}, wide.options().dtype(at::kFloat));
        const Down p = {groups_,
                        dtype_of(wide),
                        wide.const_data_ptr(),
                        wide.size(1),
                        factor.const_data_ptr<float>(),
                        across,
                        int(rank),
                        scale,
                        dropout,
                        out.mutable_data_ptr<float>()};
        check_launch(peftcore_grouped_down(&p, stream_), op_);
        return out;
    }

    // (keep ∘ wide)ᵀ thin of each expert, or transposed, into `out`.
    void reduce(const Tensor& wide, const Tensor& thin, const Dropout& dropout, bool transposed,
                const Tensor& out) const {
        const bool rounded = out.scalar_type() == at::kDouble;
        const Tensor written = rounded ? at::empty(out.sizes(), out.options().dtype(at::kFloat)) : out;
        const Reduce p = {groups_,
                          dtype_of(wide),
                          wide.const_data_ptr(),
                          thin.const_data_ptr<float>(),
                          wide.size(1),
                          int(thin.size(1)),
                          dropout,
                          dtype_of(written),
                          transposed,
                          written.mutable_data_ptr()};
        check_launch(peftcore_grouped_reduce(&p, stream_), op_);
        if (rounded) out.copy_(written);
    }

 private:
    Dtype dtype_of(const Tensor& t) const { return kernel_dtype(t.scalar_type(), op_); }

    const Tensor offsets_;
    const Groups groups_;
    void* const stream_;
    const char* const op_;
};

// Whether PyTorch's product takes rows of x and of W, which begin on 16 bytes. Others are for the reference.
bool on_16_bytes(const Tensor& x, const Weight& weight) {
    const auto rows_are = [&](int64_t columns) { return columns * x.element_size() % 16 == 0; };
    return rows_are(x.size(1)) && rows_are(weight.sizes()[2]) && is_aligned(x.const_data_ptr()) &&
           (weight.packed() || is_aligned(weight.first().const_data_ptr()));
}

// The weight; kernels take its view.
Weight contiguous_weight(at::TensorList tensors, at::IntArrayRef packing, const char* op) {
    const Weight weight(tensors, packing, op);
    if (weight.packed() || weight.first().is_contiguous()) return weight;
    const Tensor dense = weight.first().contiguous();
    return Weight({dense}, {}, op);
}

std::tuple<Tensor, Tensor> grouped_linear(const Tensor& x, const Tensor& offsets, at::TensorList tensors,
                                          at::IntArrayRef packing, const std::optional<Tensor>& bias,
                                          at::TensorList factors, bool transposed, double scale,
                                          double dropout_p, const std::optional<Tensor>& seed) {
    const char* op = "grouped_linear";
    const c10::DeviceGuard guard(x.device());
    const Weight weight = contiguous_weight(tensors, packing, op);
    check_grouped(x, offsets, weight, bias, factors, transposed, op);
    const Dropout dropout = checked_dropout(dropout_p, seed, op, x.device());
    const Tensor rows = x.contiguous(), added = contiguous(bias);
    if (!on_16_bytes(rows, weight))
        return OrReference<"peftcore::grouped_linear", "", &grouped_linear>::reference(
            x, offsets, tensors, packing, bias, factors, transposed, scale, dropout_p, seed);
    // Skips autograd, whose rule is in Python, and autocast, which has already cast.
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Call call(offsets, rows, op);
    if (factors.empty())
        return {call.product(rows, weight, transposed, added, {}, {}, {}),
                at::empty({rows.size(0), 0}, x.options().dtype(at::kFloat))};
    const Tensor s = call.down(rows, floats(factors[0]), false, dropout_factor(scale, dropout), dropout);
    return {call.product(rows, weight, transposed, added, s, floats(factors[1]), {}), s};
}

Gradients grouped_linear_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& offsets,
                                  at::TensorList tensors, at::IntArrayRef packing, at::TensorList factors,
                                  bool transposed, std::array<bool, 3> needs, double scale, double dropout_p,
                                  const std::optional<Tensor>& seed) {
    const char* op = "grouped_linear_backward";
    const c10::DeviceGuard guard(grad.device());
    const Weight weight = contiguous_weight(tensors, packing, op);
    const Sizes sizes = check_grouped_backward(grad, x, offsets, weight, factors, transposed, seed, op);
    const Dropout dropout = factors.empty() ? Dropout{} : checked_dropout(dropout_p, seed, op, grad.device());
    const Tensor rows = grad.contiguous();
    if (!on_16_bytes(rows, weight))
        return OrReference<"peftcore::grouped_linear_backward", "", &grouped_linear_backward>::reference(
            grad, x, offsets, tensors, packing, factors, transposed, needs, scale, dropout_p, seed);
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Call call(offsets, rows, op);
    auto [dx, da, db] = empty_gradients(grad, factors, sizes, {false, needs[1], needs[2]});
    Tensor t, a;
    if (!factors.empty() && (needs[0] || needs[1])) {
        if (needs[0]) a = floats(factors[0].transpose(1, 2));
        t = call.down(rows, floats(factors[1]), true, dropout_factor(scale, dropout), {});
    }
    if (!factors.empty() && needs[1]) call.reduce(x->contiguous(), t, dropout, true, da);
    if (!factors.empty() && needs[2]) call.reduce(rows, factors[2].contiguous(), {}, false, db);
    if (needs[0]) dx = call.product(rows, weight, !transposed, {}, t, a, dropout);
    return {dx, da, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CUDA, m) {
    m.impl("grouped_linear", &OrReference<"peftcore::grouped_linear", "", &grouped_linear>::call);
    m.impl("grouped_linear_backward",
           &OrReference<"peftcore::grouped_linear_backward", "", &grouped_linear_backward>::call);
}

}  // namespace grouped
}  // namespace peftcore
