// lora_linear, its gradient, and adapters by sample on CUDA. Schemas and formulas: peftcore/ops/lora.py.
//
// The sum s Bᵀ + x Wᵀ. Up to kLinearMaxBatch rows over a packed W, one kernel does both (nf4/cuda/linear.cu).
// Beyond, and over a dense W, y is first written as bias + s Bᵀ, and cuBLAS adds x Wᵀ with beta = 1: its read
// of y runs beside the product. A pass over y after the product costs the same bytes with nothing beside it.
// The gradient of x likewise.
//
// fp16 and bf16 take the kernels of this folder, with S and T in fp32; fp32 takes cuBLAS, around dropout by a
// kernel.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>

#include "common/cuda_stream.h"
#include "common/cuda_support.h"
#include "common/tensors.h"
#include "lora/arguments.h"
#include "lora/cuda/lora_cuda.h"
#include "nf4/cuda/nf4_cuda.h"

namespace peftcore {
namespace lora {
namespace {

int dtype_of(const Tensor& t) { return int(kernel_dtype(t.scalar_type(), "lora_linear")); }

bool has_kernels(const Tensor& x) { return x.scalar_type() != at::kFloat; }

Tensor float_workspace(int64_t count, const Tensor& x) {
    return at::empty({count}, x.options().dtype(at::kFloat));
}

// Factors of some adapters as launchers take them.
struct Factors {
    std::vector<Tensor> tensors;
    std::vector<const float*> pointers;
    std::vector<int> ranks;

    Factors(at::TensorList factors, int rank_dimension) {
        for (const Tensor& t : factors) {
            tensors.push_back(floats(t));
            pointers.push_back(tensors.back().const_data_ptr<float>());
            ranks.push_back(int(t.size(rank_dimension)));
        }
    }
    int count() const { return int(tensors.size()); }
};

// s [rows of x, the highest rank], x [samples, rows, columns].
Tensor down(const Tensor& x, const Factors& a, const std::vector<float>& scales, const int64_t* index,
            const Dropout& dropout, const char* op) {
    const int64_t rows = x.size(1), columns = x.size(2);
    const int rank = a.count() ? *std::max_element(a.ranks.begin(), a.ranks.end()) : 0;
    const Tensor s = at::empty({x.size(0) * rows, rank}, x.options().dtype(at::kFloat));
    const int64_t workspace = index ? 0 : peftcore_lora_down_workspace(rows, columns, rank);
    const Tensor partial = float_workspace(workspace, x);
    check_launch(
        peftcore_lora_down(x.const_data_ptr(), dtype_of(x), x.size(0), rows, columns, a.pointers.data(),
                           a.ranks.data(), scales.data(), a.count(), index, rank, dropout.threshold,
                           dropout.key0, dropout.key1, partial.mutable_data_ptr<float>(),
                           s.mutable_data_ptr<float>(), current_cuda_stream(x.device())),
        op);
    return s;
}

// keep ∘ (bias + thin Fᵀ) into out [samples, rows, columns], or added to it.
void up(const Tensor& thin, const Factors& factors, const int64_t* index, const Dropout& dropout,
        const std::optional<Tensor>& bias, bool add, const Tensor& out, const char* op) {
    const Tensor added = bias.has_value() ? bias->contiguous() : Tensor();
    check_launch(peftcore_lora_up(thin.const_data_ptr<float>(), dtype_of(out), out.size(0), out.size(1),
                                  out.size(2), factors.pointers.data(), factors.ranks.data(), factors.count(),
                                  index, int(thin.size(1)), dropout.threshold, dropout.key0, dropout.key1,
                                  added.defined() ? added.const_data_ptr() : nullptr, add,
                                  out.mutable_data_ptr(), current_cuda_stream(out.device())),
                 op);
}

// (keep ∘ wide)ᵀ thin, or transposed, in `dtype`.
Tensor reduce(const Tensor& wide, const Tensor& thin, const Dropout& dropout, bool transposed,
              at::ScalarType dtype, const char* op) {
    const int64_t rows = wide.size(0), columns = wide.size(1), rank = thin.size(1);
    const at::ScalarType written = dtype == at::kDouble ? at::kFloat : dtype;
    const Tensor out =
        at::empty({transposed ? rank : columns, transposed ? columns : rank}, wide.options().dtype(written));
    const Tensor partial = float_workspace(peftcore_lora_reduce_workspace(rows, columns, int(rank)), wide);
    check_launch(peftcore_lora_reduce(wide.const_data_ptr(), thin.const_data_ptr<float>(), dtype_of(wide),
                                      rows, columns, int(rank), dropout.threshold, dropout.key0, dropout.key1,
                                      partial.mutable_data_ptr<float>(), out.mutable_data_ptr(),
                                      dtype_of(out), transposed, current_cuda_stream(wide.device())),
                 op);
    return out.to(dtype);
}

// (wideᵀ thin in `dtype`, scale wide factorᵀ), wide read once.
std::tuple<Tensor, Tensor> reduce_and_product(const Tensor& wide, const Tensor& thin, const Tensor& factor,
                                              float scale, at::ScalarType dtype, const char* op) {
    const int64_t rows = wide.size(0), columns = wide.size(1);
    const int rank = int(thin.size(1));
    const at::ScalarType written = dtype == at::kDouble ? at::kFloat : dtype;
    const Tensor out = at::empty({columns, rank}, wide.options().dtype(written));
    const Tensor product = at::empty({rows, rank}, thin.options());
    const Tensor partial = float_workspace(peftcore_lora_reduce_workspace(rows, columns, rank), wide);
    const Tensor products = float_workspace(peftcore_lora_product_workspace(rows, columns, rank), wide);
    check_launch(peftcore_lora_reduce_and_product(
                     wide.const_data_ptr(), thin.const_data_ptr<float>(), factor.const_data_ptr<float>(),
                     dtype_of(wide), rows, columns, rank, scale, partial.mutable_data_ptr<float>(),
                     products.mutable_data_ptr<float>(), out.mutable_data_ptr(), dtype_of(out),
                     product.mutable_data_ptr<float>(), current_cuda_stream(wide.device())),
                 op);
    return {out.to(dtype), product};
}

// keep ∘ x, of a matrix.
Tensor dropped(const Tensor& x, const Dropout& dropout, const char* op) {
    if (dropout.threshold == 0) return x;
    const Tensor out = at::empty_like(x);
    check_launch(peftcore_lora_drop(x.const_data_ptr(), dtype_of(x), x.size(0), x.size(1), dropout.threshold,
                                    dropout.key0, dropout.key1, out.mutable_data_ptr(),
                                    current_cuda_stream(x.device())),
                 op);
    return out;
}

// W in x's dtype; unpacked into memory that the caching allocator hands out again for the next layer.
Tensor dense_weight(const Tensor& weight, int64_t rows, int64_t columns, const Quantized& q, const Tensor& x,
                    const char* op) {
    if (!q.packed()) return weight;
    static const auto dequantize =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("peftcore::dequantize_4bit", "")
            .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef,
                          at::ScalarType, OptionalTensor, OptionalTensor, OptionalTensor, int64_t)>();
    TORCH_CHECK_VALUE(q.code.has_value(), op, ": a packed weight needs absmax and code, found no code");
    const std::array<c10::SymInt, 2> shape{rows, columns};
    return dequantize.call(weight, *q.absmax, *q.code, q.blocksize, shape, x.scalar_type(), q.nested_absmax,
                           q.nested_code, q.nested_offset, q.nested_blocksize);
}

// x Wᵀ + bias + s bᵀ over a packed W, for few rows.
Tensor fused_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& s,
                    const Tensor& b, const Quantized& q, const char* op) {
    const int64_t rows = b.size(0), columns = x.size(1);
    TORCH_CHECK_VALUE(q.code.has_value(), op, ": a packed weight needs absmax and code, found no code");
    check_tensor(weight, at::kByte, x.device(), op, "weight");
    const nf4::Packed packed =
        nf4::packed_arguments(weight, *q.absmax, *q.code, q.blocksize, q.nested_absmax, q.nested_code,
                              q.nested_offset, q.nested_blocksize, nf4::count_of({rows, columns}, op), op);
    const nf4::Nested& nested = packed.nested;
    const Tensor added = bias.has_value() ? bias->contiguous() : Tensor(), factor = floats(b);
    const float* none = nullptr;
    const Tensor y = at::empty({x.size(0), rows}, x.options());
    check_launch(peftcore_nf4_linear(
                     x.const_data_ptr(), dtype_of(x), int(x.size(0)), packed.bytes.const_data_ptr<uint8_t>(),
                     packed.scales.const_data_ptr(), packed.code.const_data_ptr<float>(),
                     int(packed.blocksize), nested.present ? nested.absmax.const_data_ptr<float>() : none,
                     nested.present ? nested.code.const_data_ptr<float>() : none,
                     nested.present ? nested.offset.const_data_ptr<float>() : none, int(q.nested_blocksize),
                     rows, columns, added.defined() ? added.const_data_ptr() : nullptr,
                     s.const_data_ptr<float>(), factor.const_data_ptr<float>(), int(factor.size(1)),
                     y.mutable_data_ptr(), current_cuda_stream(x.device())),
                 op);
    return y;
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight,
                                       const std::optional<Tensor>& bias, const Tensor& a, const Tensor& b,
                                       double scale, double dropout_p, const std::optional<Tensor>& seed,
                                       const std::optional<Tensor>& absmax, const std::optional<Tensor>& code,
                                       int64_t blocksize, const std::optional<Tensor>& nested_absmax,
                                       const std::optional<Tensor>& nested_code,
                                       const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "lora_linear";
    const Quantized quantized{absmax,      code,          blocksize,       nested_absmax,
                              nested_code, nested_offset, nested_blocksize};
    // Below autograd, whose rule stands in Python, and autocast, which has cast already.
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const c10::DeviceGuard guard(x.device());
    const int64_t out_features = out_features_of(b, op);
    check_linear(x, weight, bias, out_features, quantized, op);
    check_factors(x, a, b, out_features, op);
    const Dropout dropout = dropout_of(dropout_p, seed, op);
    const float factor = factor_of(scale, dropout);
    const Tensor flat = matrix(x);
    const Tensor s = has_kernels(x) ? down(flat.unsqueeze(0), Factors({a}, 0), {factor}, nullptr, dropout, op)
                                    : at::mm(dropped(flat, dropout, op), floats(a).t()).mul_(factor);
    Tensor y;
    if (quantized.packed() && flat.size(0) <= nf4::kLinearMaxBatch) {
        y = fused_linear(flat, weight, bias, s, b, quantized, op);
    } else {
        const Tensor dense = dense_weight(weight, out_features, x.size(-1), quantized, x, op);
        if (has_kernels(x)) {
            y = at::empty({flat.size(0), out_features}, x.options());
            up(s, Factors({b}, 1), nullptr, {}, bias, false, y.unsqueeze(0), op);
        } else {
            y = bias.has_value() ? at::addmm(*bias, s, floats(b).t()) : at::mm(s, floats(b).t());
        }
        y.addmm_(flat, dense.t());
    }
    return {y.view(with_last(x, out_features)), s};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& s, const Tensor& weight, const Tensor& a,
    const Tensor& b, std::array<bool, 3> needs, double scale, double dropout_p,
    const std::optional<Tensor>& seed, const std::optional<Tensor>& absmax, const std::optional<Tensor>& code,
    int64_t blocksize, const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "lora_linear_backward";
    const Quantized quantized{absmax,      code,          blocksize,       nested_absmax,
                              nested_code, nested_offset, nested_blocksize};
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const c10::DeviceGuard guard(x.device());
    const int64_t out_features = out_features_of(b, op);
    check_linear(x, weight, {}, out_features, quantized, op);
    check_factors(x, a, b, out_features, op);
    const int64_t columns = x.size(-1);
    check_gradient(grad, s, x, out_features, a.size(0), op);
    if (!needs[0]) check_packed(x, weight, out_features, quantized, op);
    const Dropout dropout = dropout_of(dropout_p, seed, op);
    const float factor = factor_of(scale, dropout);
    const Tensor flat = matrix(x), rows = matrix(grad), thin = s.contiguous();

    const Tensor a_float = floats(a), b_float = floats(b);
    Tensor dx = at::empty({0}, x.options()), da = at::empty({0}, a.options()),
           db = at::empty({0}, b.options());
    Tensor t;
    const bool needs_t = needs[0] || needs[1];
    if (!has_kernels(x)) {
        if (needs_t) t = at::mm(rows, b_float).mul_(factor);
        if (needs[1]) da = at::mm(t.t(), dropped(flat, dropout, op)).to(a.scalar_type());
        if (needs[2]) db = at::mm(rows.t(), thin).to(b.scalar_type());
        if (needs[0]) dx = dropped(at::mm(t, a_float), dropout, op);
    } else {
        const Tensor b_columns = needs_t ? b_float.t().contiguous() : b_float;  // [r, out]
        if (needs_t && needs[2] && s.size(1) <= kOnePassMaxRank) {
            std::tie(db, t) = reduce_and_product(rows, thin, b_columns, factor, b.scalar_type(), op);
        } else {
            if (needs_t) t = down(rows.unsqueeze(0), Factors({b_columns}, 0), {factor}, nullptr, {}, op);
            if (needs[2]) db = reduce(rows, thin, {}, false, b.scalar_type(), op);
        }
        if (needs[1]) da = reduce(flat, t, dropout, true, a.scalar_type(), op);
        if (needs[0]) {
            dx = at::empty(flat.sizes(), x.options());
            up(t, Factors({a_float.t()}, 1), nullptr, dropout, {}, false, dx.unsqueeze(0), op);
        }
    }
    if (needs[0])
        dx = dx.addmm_(rows, dense_weight(weight, out_features, columns, quantized, x, op)).view(x.sizes());
    return {dx, da, db};
}

Tensor lora_linear_per_sample(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              at::TensorList a, at::TensorList b, at::ArrayRef<double> scales,
                              const Tensor& index, int64_t out_features, const std::optional<Tensor>& absmax,
                              const std::optional<Tensor>& code, int64_t blocksize,
                              const std::optional<Tensor>& nested_absmax,
                              const std::optional<Tensor>& nested_code,
                              const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "lora_linear_per_sample";
    const Quantized quantized{absmax,      code,          blocksize,       nested_absmax,
                              nested_code, nested_offset, nested_blocksize};
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const c10::DeviceGuard guard(x.device());
    check_linear(x, weight, bias, out_features, quantized, op);
    TORCH_CHECK_VALUE(a.size() == b.size() && a.size() == scales.size(), op,
                      ": a, b and scales must be of one length, found ", a.size(), ", ", b.size(), " and ",
                      scales.size());
    for (size_t i = 0; i < a.size(); ++i)
        check_factors(x, a[i], b[i], out_features, op, "a[" + std::to_string(i) + "]",
                      "b[" + std::to_string(i) + "]");
    check_tensor(index, at::kLong, x.device(), op, "index");
    TORCH_CHECK_VALUE(index.dim() == 1 && index.size(0) == x.size(0), op, ": index must be [", x.size(0),
                      "], one for each sample of x, found ", index.sizes());

    const Tensor flat = matrix(x), adapter = index.contiguous();
    const int64_t samples = x.size(0), rows = samples ? flat.size(0) / samples : 0;
    const Tensor y = quantized.packed() ? packed_linear(flat, weight, bias, out_features, quantized)
                     : bias.has_value() ? at::addmm(*bias, flat, weight.t())
                                        : at::mm(flat, weight.t());
    const Tensor by_sample = flat.view({samples, rows, flat.size(1)}),
                 out = y.view({samples, rows, out_features});
    if (has_kernels(x)) {
        const Factors lefts(a, 0), rights(b, 1);
        const std::vector<float> factors(scales.begin(), scales.end());
        const Tensor s = down(by_sample, lefts, factors, adapter.const_data_ptr<int64_t>(), {}, op);
        up(s, rights, adapter.const_data_ptr<int64_t>(), {}, {}, true, out, op);
    } else {  // every adapter for every row: the index stays on the device
        const Tensor wanted = adapter.view({samples, 1, 1}), zero = at::zeros({}, x.options());
        for (size_t i = 0; i < a.size(); ++i) {
            const Tensor s = at::mm(flat, floats(a[i]).t()).mul_(scales[i]);
            const Tensor added = at::mm(s, floats(b[i]).t()).view(out.sizes());
            out.add_(at::where(wanted.eq(int64_t(i)), added, zero));
        }
        const Tensor unknown = wanted.lt(-1).logical_or(wanted.ge(int64_t(a.size())));
        out.masked_fill_(unknown, std::numeric_limits<double>::quiet_NaN());
    }
    return y.view(with_last(x, out_features));
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CUDA, m) {
    m.impl("lora_linear", &OrReference<"peftcore::lora_linear", "", &lora_linear>::call);
    m.impl("lora_linear_backward",
           &OrReference<"peftcore::lora_linear_backward", "", &lora_linear_backward>::call);
    m.impl("lora_linear_per_sample",
           &OrReference<"peftcore::lora_linear_per_sample", "", &lora_linear_per_sample>::call);
}

}  // namespace lora
}  // namespace peftcore
