// grouped_linear and its gradient on CUDA. Schemas and formulas: peftcore/ops/grouped_operators.py. The
// offsets stay on the device, where every block reads them: there is no synchronization.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "common/cuda_stream.h"
#include "common/cuda_support.h"
#include "common/tensors.h"
#include "grouped/arguments.h"
#include "grouped/cuda/grouped_cuda.h"

namespace peftcore {
namespace grouped {
namespace {

using lora::Dropout;

// Arguments shared by an operator's launches, and launchers that take tensors.
class Call {
 public:
    Call(const Tensor& offsets, const Tensor& t, const char* op)
        : offsets_(offsets.contiguous()),
          groups_{offsets_.const_data_ptr<int32_t>(), offsets_.numel(), t.size(0)},
          stream_(current_cuda_stream(t.device())),
          op_(op) {}

    // keep ∘ (thin Fᵀ) + wide W + bias, for a contiguous W; undefined tensors are left out.
    void product(const Tensor& wide, const WeightView& weight, bool across, const Tensor& bias,
                 const Tensor& thin, const Tensor& factor, bool factor_across, const Dropout& dropout,
                 const Tensor& out) const {
        Product p = {};
        p.groups = groups_;
        p.dtype = dtype_of(wide);
        p.wide = wide.const_data_ptr();
        p.out = out.mutable_data_ptr();
        p.inner = wide.size(1);
        p.columns = out.size(1);
        p.weight = weight;
        p.across = across;
        if (bias.defined()) p.bias = bias.const_data_ptr();
        if (thin.defined()) {
            p.thin = thin.const_data_ptr<float>();
            p.factor = factor.const_data_ptr<float>();
            p.factor_across = factor_across;
            p.rank = int(thin.size(1));
            p.dropout = dropout;
        }
        check_launch(peftcore_grouped_product(&p, stream_), op_);
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
    // Skips autograd, whose rule is in Python, and autocast, which has already cast.
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const c10::DeviceGuard guard(x.device());
    const Weight weight = contiguous_weight(tensors, packing, op);
    const Sizes sizes = check_grouped(x, offsets, weight, bias, factors, transposed, op);
    const Dropout dropout = lora::dropout_of(dropout_p, seed, op, x.device());
    const Tensor rows = x.contiguous(), added = contiguous(bias);
    const Call call(offsets, rows, op);
    const Tensor y = at::empty({rows.size(0), sizes.out}, x.options());
    if (factors.empty()) {
        call.product(rows, weight.view(), transposed, added, {}, {}, false, {}, y);
        return {y, at::empty({rows.size(0), 0}, x.options().dtype(at::kFloat))};
    }
    const Tensor s = call.down(rows, floats(factors[0]), false, lora::factor_of(scale, dropout), dropout);
    call.product(rows, weight.view(), transposed, added, s, floats(factors[1]), false, {}, y);
    return {y, s};
}

Gradients grouped_linear_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& offsets,
                                  at::TensorList tensors, at::IntArrayRef packing, at::TensorList factors,
                                  bool transposed, std::array<bool, 3> needs, double scale, double dropout_p,
                                  const std::optional<Tensor>& seed) {
    const char* op = "grouped_linear_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const c10::DeviceGuard guard(grad.device());
    const Weight weight = contiguous_weight(tensors, packing, op);
    const Sizes sizes = check_grouped_backward(grad, x, offsets, weight, factors, transposed, seed, op);
    const Dropout dropout =
        factors.empty() ? Dropout{} : lora::dropout_of(dropout_p, seed, op, grad.device());
    const Tensor rows = grad.contiguous();
    const Call call(offsets, rows, op);
    const auto [dx, da, db] = empty_gradients(grad, factors, sizes, needs);
    Tensor t, a;
    if (!factors.empty() && (needs[0] || needs[1])) {
        a = floats(factors[0]);
        t = call.down(rows, floats(factors[1]), true, lora::factor_of(scale, dropout), {});
    }
    if (!factors.empty() && needs[1]) call.reduce(x->contiguous(), t, dropout, true, da);
    if (!factors.empty() && needs[2]) call.reduce(rows, factors[2].contiguous(), {}, false, db);
    if (needs[0]) call.product(rows, weight.view(), !transposed, {}, t, a, true, dropout, dx);
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
