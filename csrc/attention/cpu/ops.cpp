// attention on CPU. Schemas and formulas: peftcore/ops/attention.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "common/check.h"
#include "common/dropout_arguments.h"
#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "simd/keep_bytes.h"

namespace peftcore {
namespace attention {

using namespace simd;
namespace {

using at::Tensor;

constexpr float kUnseen = -std::numeric_limits<float>::infinity();

void check_heads(const Tensor& t, const Tensor& q, const char* op, const char* name) {
    TORCH_CHECK_TYPE(t.scalar_type() == q.scalar_type(), op, ": ", name, " must be ", q.scalar_type(),
                     " like q, found ", t.scalar_type());
    TORCH_CHECK_VALUE(t.dim() == 4 && t.size(0) == q.size(0) && t.size(3) == q.size(3), op, ": ", name,
                      " must be [", q.size(0), ", heads, tokens, ", q.size(3), "] for q, found ", t.sizes());
    TORCH_CHECK_VALUE(t.device() == q.device(), op, ": ", name, " must be on ", q.device(), " like q, found ",
                      t.device());
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                     const char* op) {
    kernel_dtype(q.scalar_type(), op);
    TORCH_CHECK_VALUE(q.dim() == 4, op, ": q must be [batch, heads, tokens, size], found ", q.sizes());
    check_heads(k, q, op, "k");
    check_heads(v, q, op, "v");
    TORCH_CHECK_VALUE(v.sizes() == k.sizes(), op, ": v must be ", k.sizes(), " like k, found ", v.sizes());
    TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0, op, ": the ", q.size(1),
                      " heads of q must be a multiple of those of k, found ", k.size(1));
    if (!mask.has_value()) return;
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, op, ": mask must be torch.bool, found ",
                     mask->scalar_type());
    const int64_t expected[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
    bool fits = mask->dim() == 4;
    for (int64_t i = 0; fits && i < 4; ++i) fits = mask->size(i) == 1 || mask->size(i) == expected[i];
    TORCH_CHECK_VALUE(fits, op, ": mask must broadcast to ", at::IntArrayRef(expected), ", found ",
                      mask->sizes());
    TORCH_CHECK_VALUE(mask->device() == q.device(), op, ": mask must be on ", q.device(), " like q, found ",
                      mask->device());
}

Tensor with_dense_rows(const Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

Heads heads_of(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// [batch, heads, tokens, size], whose memory is [batch, tokens, heads, size]: layers take it in this order.
Tensor by_tokens(const Tensor& like) {
    return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options())
        .transpose(1, 2);
}

const Kernels* kernels_for(const Tensor& q, const Tensor& k) {
    const Kernels& kernels = cpu_kernels().attention[int(kernel_dtype(q.scalar_type(), "attention"))];
    const bool takes = kernels.forward != nullptr && q.numel() != 0 && k.numel() != 0 &&
                       q.size(3) % kHeadSizeMultiple == 0 && k.size(2) <= kMostKeys;
    return takes ? &kernels : nullptr;
}

AttentionArgs args_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, bool causal,
                      double scale, const Dropout& dropout, const Tensor& out, const Tensor& lse) {
    AttentionArgs args{.key_heads = k.size(1),
                       .group_size = q.size(1) / k.size(1),
                       .queries = q.size(2),
                       .keys = k.size(2),
                       .size = q.size(3),
                       .scale = float(scale),
                       .causal = causal,
                       .mask = mask.defined() ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr,
                       .mask_strides = {},
                       .dropout = dropout,
                       .kept_factor = dropout_factor(1, dropout),
                       .q = heads_of(q),
                       .k = heads_of(k),
                       .v = heads_of(v),
                       .out = heads_of(out),
                       .lse = lse.mutable_data_ptr<float>()};
    for (int64_t i = 0; mask.defined() && i < 4; ++i)
        args.mask_strides[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
    return args;
}

// Single queries of the heads that share a key head are like as many queries of one head, multiplied together.
void join_heads(AttentionArgs& args) {
    if (args.queries != 1 || args.group_size == 1 || args.dropout.threshold != 0) return;
    const auto joined = [&](Heads& heads) {
        heads.token_stride = heads.head_stride;
        heads.head_stride *= args.group_size;
    };
    joined(args.q);
    joined(args.out);
    args.mask_strides[2] = args.mask_strides[1];
    args.mask_strides[1] *= args.group_size;
    if (args.causal) args.keys = 1;  // all that a first query sees
    args.causal = false;
    args.queries = args.group_size;
    args.group_size = 1;
}

Tensor mask_of(const std::optional<Tensor>& mask) {
    if (!mask.has_value()) return {};
    return mask->size(3) == 1 || mask->stride(3) == 1 ? *mask : mask->contiguous();
}

// Without a kernel, in fp32. Heads of k and v as often as q has them.
Tensor repeated(const Tensor& t, const Tensor& q) {
    return t.to(at::kFloat).repeat_interleave(q.size(1) / t.size(1), 1);
}

Tensor scores_of(const Tensor& q, const Tensor& k, const std::optional<Tensor>& mask, bool causal,
                 double scale) {
    Tensor scores = q.to(at::kFloat).matmul(repeated(k, q).transpose(2, 3)).mul(scale);
    if (mask.has_value()) scores = scores.masked_fill(mask->logical_not(), kUnseen);
    if (causal)
        scores = scores.masked_fill(
            at::ones({q.size(2), k.size(2)}, scores.options().dtype(at::kBool)).triu(1), kUnseen);
    return scores;
}

// Rows that see no key have an lse of infinity.
Tensor probabilities(const Tensor& scores, const Tensor& lse) { return scores.sub(lse.unsqueeze(3)).exp(); }

// 1 / (1 - p) where dropout keeps a probability, else 0.
Tensor dropout_factors(const Dropout& dropout, const Tensor& q, const Tensor& k) {
    const int64_t keys = k.size(2), counters = ceil_div(keys, kColumnsPerCounter);
    const Tensor factors = at::empty({q.size(0), q.size(1), q.size(2), keys}, q.options().dtype(at::kFloat));
    const auto keep_bytes = cpu_kernels().lora.thin[int(Dtype::kFloat)].keep_bytes;
    const float factor = dropout_factor(1, dropout);
    std::vector<uint8_t> bits(size_t(filled_up(counters, kCounters)));
    float* out = factors.mutable_data_ptr<float>();
    for (int64_t row = 0; row < q.size(0) * q.size(1) * q.size(2); ++row, out += keys) {
        keep_bytes(dropout, row, 0, counters, bits.data());
        for (int64_t i = 0; i < keys; ++i) out[i] = (bits[size_t(i / 8)] >> i % 8 & 1) != 0 ? factor : 0.0f;
    }
    return factors;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_arg, const Tensor& k_arg, const Tensor& v_arg,
                                     const std::optional<Tensor>& mask_arg, bool causal, double scale,
                                     double dropout_p, const std::optional<Tensor>& seed) {
    const char* op = "attention";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_attention(q_arg, k_arg, v_arg, mask_arg, op);
    const Dropout dropout = checked_dropout(dropout_p, seed, op);
    const Kernels* kernels = kernels_for(q_arg, k_arg);
    if (kernels == nullptr) {
        const Tensor scores = scores_of(q_arg, k_arg, mask_arg, causal, scale);
        Tensor lse = scores.logsumexp(3);
        lse.masked_fill_(lse.eq(kUnseen), -kUnseen);
        const Tensor out = by_tokens(q_arg);
        Tensor p = probabilities(scores, lse);
        if (dropout.threshold != 0) p = p.mul(dropout_factors(dropout, q_arg, k_arg));
        out.copy_(p.matmul(repeated(v_arg, q_arg)));
        return {out, lse};
    }
    const Tensor q = with_dense_rows(q_arg), k = with_dense_rows(k_arg), v = with_dense_rows(v_arg),
                 mask = mask_of(mask_arg), out = by_tokens(q),
                 lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
    AttentionArgs args = args_of(q, k, v, mask, causal, scale, dropout, out, lse);
    join_heads(args);
    at::parallel_for(0, q.size(0) * k.size(1),
                     ceil_div(kProductsPerTask, args.group_size * args.queries * args.keys * args.size),
                     [&](int64_t first, int64_t last) { kernels->forward(args, first, last); });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_arg, const Tensor& q_arg,
                                                      const Tensor& k_arg, const Tensor& v_arg,
                                                      const Tensor& out_arg, const Tensor& lse_arg,
                                                      const std::optional<Tensor>& mask_arg, bool causal,
                                                      double scale, double dropout_p,
                                                      const std::optional<Tensor>& seed) {
    const char* op = "attention_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_attention(q_arg, k_arg, v_arg, mask_arg, op);
    for (const auto& [t, name] : {std::pair(&grad_arg, "grad"), std::pair(&out_arg, "out")}) {
        check_heads(*t, q_arg, op, name);
        TORCH_CHECK_VALUE(t->sizes() == q_arg.sizes(), op, ": ", name, " must be ", q_arg.sizes(),
                          " like q, found ", t->sizes());
    }
    TORCH_CHECK_TYPE(lse_arg.scalar_type() == at::kFloat, op, ": lse must be torch.float32, found ",
                     lse_arg.scalar_type());
    TORCH_CHECK_VALUE(lse_arg.device() == q_arg.device(), op, ": lse must be on ", q_arg.device(),
                      " like q, found ", lse_arg.device());
    TORCH_CHECK_VALUE(lse_arg.sizes() == q_arg.sizes().slice(0, 3), op, ": lse must be ",
                      q_arg.sizes().slice(0, 3), ", found ", lse_arg.sizes());
    const Dropout dropout = checked_dropout(dropout_p, seed, op);
    const Tensor dq = by_tokens(q_arg), dk = by_tokens(k_arg), dv = by_tokens(k_arg);
    const Kernels* kernels = kernels_for(q_arg, k_arg);
    if (kernels == nullptr) {
        const Tensor grad = grad_arg.to(at::kFloat), delta = grad.mul(out_arg.to(at::kFloat)).sum(3, true);
        Tensor p = probabilities(scores_of(q_arg, k_arg, mask_arg, causal, scale), lse_arg),
               dp = grad.matmul(repeated(v_arg, q_arg).transpose(2, 3));
        const Tensor factors = dropout.threshold == 0 ? Tensor() : dropout_factors(dropout, q_arg, k_arg);
        if (factors.defined()) dp = dp.mul(factors);
        const Tensor ds = p.mul(dp.sub(delta)).mul(scale);
        if (factors.defined()) p = p.mul(factors);
        const auto of_groups = [&](const Tensor& t) {
            return t.unflatten(1, {k_arg.size(1), q_arg.size(1) / k_arg.size(1)}).sum(2);
        };
        dq.copy_(ds.matmul(repeated(k_arg, q_arg)));
        dk.copy_(of_groups(ds.transpose(2, 3).matmul(q_arg.to(at::kFloat))));
        dv.copy_(of_groups(p.transpose(2, 3).matmul(grad)));
        return {dq, dk, dv};
    }
    const Tensor grad = with_dense_rows(grad_arg), q = with_dense_rows(q_arg), k = with_dense_rows(k_arg),
                 v = with_dense_rows(v_arg), out = with_dense_rows(out_arg), lse = lse_arg.contiguous(),
                 mask = mask_of(mask_arg);
    AttentionArgs args = args_of(q, k, v, mask, causal, scale, dropout, out, lse);
    args.grad = heads_of(grad);
    args.dq = heads_of(dq);
    args.dk = heads_of(dk);
    args.dv = heads_of(dv);
    at::parallel_for(0, q.size(0) * k.size(1),
                     ceil_div(kProductsPerTask, args.group_size * args.queries * args.keys * args.size),
                     [&](int64_t first, int64_t last) { kernels->backward(args, first, last); });
    return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("attention", &attention);
    m.impl("attention_backward", &attention_backward);
}

}  // namespace attention
}  // namespace peftcore
