// lora_linear, its gradient, and per-sample adapters on CUDA. Schemas and formulas: peftcore/ops/lora.py.
//
// The sum s Bᵀ + x Wᵀ. Where peftcore_quant4_linear takes x and W, few rows and 4 bits, one kernel does both, and up
// to kRankDotRows s as well (one_launch.cu). Beyond, and with a dense W, y is first written as bias + s Bᵀ, and cuBLAS
// adds x Wᵀ with beta = 1: its read of y overlaps with the product. A pass over y after the product would read the same
// bytes without overlap. The gradient of x is computed likewise.
//
// fp16 and bf16 use the kernels of this folder, with S and T in fp32; fp32 uses cuBLAS, and a kernel for dropout.
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
#include "quant4/cuda/linear.h"
#include "quant4/cuda/quant4_cuda.h"

namespace peftcore {
namespace lora {
namespace {

int dtype_of(const Tensor& t) { return int(kernel_dtype(t.scalar_type(), "lora_linear")); }

bool has_kernels(const Tensor& x) { return x.scalar_type() != at::kFloat; }

Tensor float_workspace(int64_t count, const Tensor& x) {
    return at::empty({count}, x.options().dtype(at::kFloat));
}

// t [samples * rows, columns] as launchers take it. They write to it only where noted.
Wide wide_of(const Tensor& t, int64_t samples = 1) {
    return {const_cast<void*>(t.const_data_ptr()), kernel_dtype(t.scalar_type(), "lora_linear"), samples,
            samples == 0 ? 0 : t.size(0) / samples, t.size(1)};
}

// Factors of some adapters, fp32 and contiguous, as tensors and as launchers take them.
class FactorList {
 public:
    FactorList(at::TensorList factors, int rank_dimension, std::vector<float> scales = {},
               const int64_t* index = nullptr)
        : scales_(std::move(scales)), index_(index) {
        for (const Tensor& t : factors) {
            tensors_.push_back(t);
            pointers_.push_back(t.const_data_ptr<float>());
            ranks_.push_back(int(t.size(rank_dimension)));
        }
    }
    int highest_rank() const { return ranks_.empty() ? 0 : *std::max_element(ranks_.begin(), ranks_.end()); }
    Factors view(int64_t stride) const {
        return {pointers_.data(),   ranks_.data(), scales_.empty() ? nullptr : scales_.data(),
                int(ranks_.size()), int(stride),   index_};
    }

 private:
    std::vector<Tensor> tensors_;
    std::vector<const float*> pointers_;
    std::vector<int> ranks_;
    std::vector<float> scales_;
    const int64_t* index_;
};

// Factors in fp32, contiguous, transposed where asked: those that need a copy are collected, and copied by one launch
// for up to 64 of them.
class FactorCopies {
 public:
    explicit FactorCopies(const char* op) : op_(op) {}

    // Can be read after `launch`.
    Tensor add(const Tensor& factor, bool transposed) {
        const bool copied = factor.scalar_type() == at::kHalf || factor.scalar_type() == at::kBFloat16;
        const Tensor source = copied ? factor.contiguous() : floats(factor);
        if (source.scalar_type() == at::kFloat && !transposed) return source;
        const int64_t rows = factor.size(0), columns = factor.size(1);
        const Tensor result = at::empty({transposed ? columns : rows, transposed ? rows : columns},
                                        factor.options().dtype(at::kFloat));
        copies_.push_back({source.const_data_ptr(), kernel_dtype(source.scalar_type(), op_), rows, columns,
                           transposed, result.mutable_data_ptr<float>()});
        sources_.push_back(source);
        return result;
    }
    std::vector<Tensor> add_all(at::TensorList factors) {
        std::vector<Tensor> results;
        for (const Tensor& factor : factors) results.push_back(add(factor, false));
        return results;
    }
    void launch() const {
        if (copies_.empty()) return;
        void* stream = current_cuda_stream(sources_[0].device());
        check_launch(peftcore_lora_copy_factors(copies_.data(), int(copies_.size()), stream), op_);
    }

 private:
    const char* op_;
    std::vector<Tensor> sources_;
    std::vector<FactorCopy> copies_;
};

// Both factors of an adapter.
std::array<Tensor, 2> float_factors(const Tensor& a, bool a_transposed, const Tensor& b, bool b_transposed,
                                    const char* op) {
    FactorCopies copies(op);
    const std::array<Tensor, 2> results = {copies.add(a, a_transposed), copies.add(b, b_transposed)};
    copies.launch();
    return results;
}

// s [rows of x, the highest rank].
Tensor down(const Tensor& x, int64_t samples, const FactorList& a, const Dropout& dropout, const char* op) {
    const Wide wide = wide_of(x, samples);
    const Factors factors = a.view(a.highest_rank());
    const Tensor s = at::empty({x.size(0), factors.stride}, x.options().dtype(at::kFloat));
    const int64_t workspace =
        factors.index ? 0 : peftcore_lora_down_workspace(wide.rows, wide.columns, factors.stride);
    const Tensor partial = float_workspace(workspace, x);
    check_launch(peftcore_lora_down(&wide, &factors, &dropout, partial.mutable_data_ptr<float>(),
                                    s.mutable_data_ptr<float>(), current_cuda_stream(x.device())),
                 op);
    return s;
}

// bias + keep ∘ (thin Fᵀ) into out, or added to it.
void up(const Tensor& thin, const FactorList& list, const Dropout& dropout, const Tensor& bias, bool add,
        const Tensor& out, int64_t samples, const char* op) {
    const Wide written = wide_of(out, samples);
    const Factors factors = list.view(thin.size(1));
    check_launch(peftcore_lora_up(thin.const_data_ptr<float>(), &factors, &dropout,
                                  bias.defined() ? bias.const_data_ptr() : nullptr, add, &written,
                                  current_cuda_stream(out.device())),
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
    const Wide read = wide_of(wide);
    check_launch(peftcore_lora_reduce(&read, thin.const_data_ptr<float>(), int(rank), &dropout,
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
    const Wide read = wide_of(wide);
    check_launch(
        peftcore_lora_reduce_and_product(
            &read, thin.const_data_ptr<float>(), factor.const_data_ptr<float>(), rank, scale,
            partial.mutable_data_ptr<float>(), products.mutable_data_ptr<float>(), out.mutable_data_ptr(),
            dtype_of(out), product.mutable_data_ptr<float>(), current_cuda_stream(wide.device())),
        op);
    return {out.to(dtype), product};
}

// keep ∘ x, of a matrix.
Tensor dropped(const Tensor& x, const Dropout& dropout, const char* op) {
    if (dropout.threshold == 0) return x;
    const Tensor out = at::empty_like(x);
    const Wide read = wide_of(x);
    check_launch(peftcore_lora_drop(&read, &dropout, out.mutable_data_ptr(), current_cuda_stream(x.device())),
                 op);
    return out;
}

// y and s in one launch; undefined where there is no kernel for that.
Tensor one_launch(const Tensor& x, const WeightView& weight, const Tensor& bias, const Tensor& a,
                  const Tensor& b, float scale, const Tensor& s, const char* op) {
    const auto factor = [](const Tensor& t) {
        const bool is_16_bit = t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
        return is_16_bit ? t.contiguous() : floats(t);
    };
    const Tensor left = factor(a), right = factor(b);
    const Tensor y = at::empty({x.size(0), weight.rows}, x.options());
    const OneLaunch launch_args = {x.const_data_ptr(),
                                   kernel_dtype(x.scalar_type(), op),
                                   int(x.size(0)),
                                   bias.defined() ? bias.const_data_ptr() : nullptr,
                                   left.const_data_ptr(),
                                   right.const_data_ptr(),
                                   kernel_dtype(left.scalar_type(), op),
                                   kernel_dtype(right.scalar_type(), op),
                                   int(a.size(0)),
                                   scale,
                                   s.mutable_data_ptr<float>(),
                                   y.mutable_data_ptr()};
    bool launched = false;
    check_launch(peftcore_lora_one_launch(&launch_args, &weight, &launched, current_cuda_stream(x.device())),
                 op);
    return launched ? y : Tensor();
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, at::TensorList tensors, at::IntArrayRef packing,
                                       const std::optional<Tensor>& bias, const Tensor& a, const Tensor& b,
                                       double scale, double dropout_p, const std::optional<Tensor>& seed) {
    const char* op = "lora_linear";
    // Skips autograd, whose rule is in Python, and autocast, which has already cast.
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const c10::DeviceGuard guard(x.device());
    const Weight weight(tensors, packing, op);
    check_linear(x, weight, bias, op);
    check_factors(operand(x), a, b, weight.rows(), op);
    const Dropout dropout = checked_dropout(dropout_p, seed, op, x.device());
    const float factor = dropout_factor(scale, dropout);
    const Tensor flat = matrix(x), added = contiguous(bias);
    if (has_kernels(x) && weight.packed() && dropout.threshold == 0 && flat.size(0) <= kRankDotRows) {
        const Tensor s = at::empty({flat.size(0), a.size(0)}, x.options().dtype(at::kFloat));
        const Tensor y = one_launch(flat, weight.view(), added, a, b, factor, s, op);
        if (y.defined()) return {y.view(with_last(x, weight.rows())), s};
    }
    const auto [a_float, b_float] = float_factors(a, false, b, false, op);
    const Tensor s = has_kernels(x) ? down(flat, 1, FactorList({a_float}, 0, {factor}), dropout, op)
                                    : at::mm(dropped(flat, dropout, op), a_float.t()).mul_(factor);
    Tensor y = quant4::linear_direct(flat, weight, added, s, b_float);
    if (!y.defined()) {
        const Tensor dense = quant4::dense_weight(weight, x);
        if (has_kernels(x)) {
            y = at::empty({flat.size(0), weight.rows()}, x.options());
            up(s, FactorList({b_float}, 1), {}, added, false, y, 1, op);
        } else {
            y = bias.has_value() ? at::addmm(*bias, s, b_float.t()) : at::mm(s, b_float.t());
        }
        y.addmm_(flat, dense.t());
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
    const c10::DeviceGuard guard(x.device());
    const Weight weight(tensors, packing, op);
    check_linear(x, weight, {}, op);
    check_factors(operand(x), a, b, weight.rows(), op);
    check_gradient(grad, s, x, weight.rows(), a.size(0), op);
    const Dropout dropout = checked_dropout(dropout_p, seed, op, grad.device());
    const float factor = dropout_factor(scale, dropout);
    const Tensor flat = matrix(x), rows = matrix(grad), thin = s.contiguous();

    Tensor dx = at::empty({0}, x.options()), da = at::empty({0}, a.options()),
           db = at::empty({0}, b.options());
    Tensor t;
    const bool needs_t = needs[0] || needs[1];
    if (!has_kernels(x)) {
        const Tensor a_float = floats(a), b_float = floats(b);
        if (needs_t) t = at::mm(rows, b_float).mul_(factor);
        if (needs[1]) da = at::mm(t.t(), dropped(flat, dropout, op)).to(a.scalar_type());
        if (needs[2]) db = at::mm(rows.t(), thin).to(b.scalar_type());
        if (needs[0]) dx = dropped(at::mm(t, a_float), dropout, op);
    } else {
        std::array<Tensor, 2> across;  // A [in, r], B [r, out]
        if (needs_t) across = float_factors(a, needs[0], b, true, op);
        if (needs_t && needs[2] && s.size(1) <= kOnePassMaxRank) {
            std::tie(db, t) = reduce_and_product(rows, thin, across[1], factor, b.scalar_type(), op);
        } else {
            if (needs_t) t = down(rows, 1, FactorList({across[1]}, 0, {factor}), {}, op);
            if (needs[2]) db = reduce(rows, thin, {}, false, b.scalar_type(), op);
        }
        if (needs[1]) da = reduce(flat, t, dropout, true, a.scalar_type(), op);
        if (needs[0]) {
            dx = at::empty(flat.sizes(), x.options());
            up(t, FactorList({across[0]}, 1), dropout, {}, false, dx, 1, op);
        }
    }
    if (needs[0]) dx = dx.addmm_(rows, quant4::dense_weight(weight, x)).view(x.sizes());
    return {dx, da, db};
}

Tensor lora_linear_per_sample(const Tensor& x, at::TensorList tensors, at::IntArrayRef packing,
                              const std::optional<Tensor>& bias, at::TensorList a, at::TensorList b,
                              at::ArrayRef<double> scales, const Tensor& index) {
    const char* op = "lora_linear_per_sample";
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const c10::DeviceGuard guard(x.device());
    const Weight weight(tensors, packing, op);
    check_linear(x, weight, bias, op);
    check_adapters(x, a, b, scales, index, weight.rows(), op);

    const Tensor flat = matrix(x), adapter = index.contiguous();
    const int64_t samples = x.size(0), rows = samples ? flat.size(0) / samples : 0;
    Tensor y = quant4::linear_direct(flat, weight, contiguous(bias), {}, {});
    if (!y.defined()) {
        const Tensor dense = quant4::dense_weight(weight, x);
        y = bias.has_value() ? at::addmm(*bias, flat, dense.t()) : at::mm(flat, dense.t());
    }
    if (has_kernels(x)) {
        const int64_t* numbers = adapter.const_data_ptr<int64_t>();
        FactorCopies copies(op);
        const std::vector<Tensor> left = copies.add_all(a), right = copies.add_all(b);
        copies.launch();
        const Tensor s =
            down(flat, samples, FactorList(left, 0, {scales.begin(), scales.end()}, numbers), {}, op);
        up(s, FactorList(right, 1, {}, numbers), {}, {}, true, y, samples, op);
    } else {  // every adapter for every row: the index stays on the device
        const Tensor out = y.view({samples, rows, weight.rows()});
        const Tensor adapter_index = adapter.view({samples, 1, 1}), zero = at::zeros({}, x.options());
        for (size_t i = 0; i < a.size(); ++i) {
            const Tensor s = at::mm(flat, floats(a[i]).t()).mul_(scales[i]);
            const Tensor added = at::mm(s, floats(b[i]).t()).view(out.sizes());
            out.add_(at::where(adapter_index.eq(int64_t(i)), added, zero));
        }
        const Tensor unknown = adapter_index.lt(-1).logical_or(adapter_index.ge(int64_t(a.size())));
        out.masked_fill_(unknown, std::numeric_limits<double>::quiet_NaN());
    }
    return y.view(with_last(x, weight.rows()));
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
