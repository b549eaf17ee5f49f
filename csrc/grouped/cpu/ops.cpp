// grouped_linear and its gradient on CPU. Schemas and formulas: peftcore/ops/grouped_operators.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "cpu/kernels.h"
#include "grouped/arguments.h"
#include "grouped/cpu/groups.h"
#include "grouped/cpu/product.h"
#include "lora/cpu/thin.h"

namespace peftcore {
namespace grouped {
namespace {

using lora::ThinKernels;

// The part of a tensor of all experts that belongs to one.
Tensor rows_of(const Tensor& t, const Group& group) { return t.narrow(0, group.first, group.rows); }

void no_rows_behind(const Tensor& t, const std::vector<Group>& groups) {
    const int64_t end = end_of(groups);
    if (end < t.size(0)) t.narrow(0, end, t.size(0) - end).zero_();
}

// A factor of one expert in the layout of W (see lora::ThinProduct), fp32, contiguous; `transposed` is W's layout, and
// `as_is` the one that the factor has already.
Tensor addend_factor(const Tensor& factor, bool transposed, bool as_is) {
    return transposed == as_is ? factor : factor.t().contiguous();
}

const ThinKernels& thin_kernels(const CpuKernels& kernels, const Tensor& x, const char* op) {
    return kernels.lora.thin[int(kernel_dtype(x.scalar_type(), op))];
}

std::tuple<Tensor, Tensor> grouped_linear(const Tensor& x, const Tensor& offsets, at::TensorList tensors,
                                          at::IntArrayRef packing, const std::optional<Tensor>& bias,
                                          at::TensorList factors, bool transposed, double scale,
                                          double dropout_p, const std::optional<Tensor>& seed) {
    const char* op = "grouped_linear";
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Weight weight(tensors, packing, op);
    const Sizes sizes = check_grouped(x, offsets, weight, bias, factors, transposed, op);
    const Dropout dropout = checked_dropout(dropout_p, seed, op);
    const Tensor rows = x.contiguous(), biases = contiguous(bias);
    const std::vector<Group> groups = groups_of(offsets, rows.size(0), op);
    const int64_t r = factors.empty() ? 0 : factors[0].size(1);
    const Tensor y = at::empty({rows.size(0), sizes.out}, x.options()),
                 s = at::empty({rows.size(0), r}, x.options().dtype(at::kFloat));
    const CpuKernels& kernels = cpu_kernels();
    const ThinKernels& thin = thin_kernels(kernels, x, op);
    const Matrices matrices(weight, transposed, op);
    for_each(groups, [&](const Group& group, const Group* next) {
        if (group.rows == 0) return;
        Matrix matrix = matrices.forward(group.expert);
        if (r == 0 && multiply_few(kernels, rows, group, matrix, biases, y)) return;
        const Matrix following = next == nullptr ? Matrix{} : matrices.forward(next->expert);
        if (next != nullptr) matrix.right.following = &following.right.view;
        const Tensor group_x = rows_of(rows, group), group_y = rows_of(y, group), group_s = rows_of(s, group);
        const Tensor expert_bias = biases.defined() ? biases.select(0, group.expert) : Tensor();
        if (r == 0) return multiply(kernels, group_x, matrix, expert_bias, group_y);
        const Tensor a = floats(factors[0].select(0, group.expert)),
                     b = floats(factors[1].select(0, group.expert));
        const lora::KeepMask keep = lora::keep_mask(thin, dropout, group_x, group.first);
        const lora::Factor right = lora::arranged_factor(thin.arrangement, a, true);
        lora::down(thin, lora::down_args(group_x, right, dropout_factor(scale, dropout), keep.mask, group_s),
                   group.rows);
        if (group_y.numel() == 0) return;
        const bool turned = matrix.right.transposed;
        if (lora::whole_product(kernels, group_x, matrix.right, expert_bias,
                                {group_s, addend_factor(b, turned, true), {}}, group_y))
            return;
        multiply(kernels, group_x, matrix, expert_bias, group_y);
        lora::up(thin, group_y, group_s, lora::arranged_factor(thin.plain, b, true), {});
    });
    no_rows_behind(y, groups);
    no_rows_behind(s, groups);
    return {y, s};
}

Gradients grouped_linear_backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& offsets,
                                  at::TensorList tensors, at::IntArrayRef packing, at::TensorList factors,
                                  bool transposed, std::array<bool, 3> needs, double scale, double dropout_p,
                                  const std::optional<Tensor>& seed) {
    const char* op = "grouped_linear_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Weight weight(tensors, packing, op);
    const Sizes sizes = check_grouped_backward(grad, x, offsets, weight, factors, transposed, seed, op);
    const Dropout dropout = factors.empty() ? Dropout{} : checked_dropout(dropout_p, seed, op);
    const Tensor dy = grad.contiguous();
    const std::vector<Group> groups = groups_of(offsets, dy.size(0), op);
    const auto [dx, da, db] = empty_gradients(dy, factors, sizes, needs);
    const int64_t r = factors.empty() ? 0 : factors[0].size(1);
    const bool is_thin = r != 0 && sizes.in != 0 && sizes.out != 0;
    const Tensor rows = is_thin ? x->contiguous() : Tensor(),
                 s = is_thin ? factors[2].contiguous() : Tensor();
    const CpuKernels& kernels = cpu_kernels();
    const ThinKernels& thin = thin_kernels(kernels, dy, op);
    const Matrices matrices(weight, transposed, op);
    // An expert's gradient of a factor, in fp32: written in place if the result is fp32.
    const auto expert_gradient = [](const Tensor& all, int64_t expert, bool needed) {
        if (!needed) return Tensor();
        const Tensor its = all.select(0, expert);
        return its.scalar_type() == at::kFloat ? its
                                               : at::empty(its.sizes(), its.options().dtype(at::kFloat));
    };
    const auto store = [](const Tensor& its, const Tensor& all, int64_t expert) {
        if (its.defined() && all.scalar_type() != at::kFloat) all.select(0, expert).copy_(its);
    };
    for_each(groups, [&](const Group& group, const Group* next) {
        if (group.rows == 0 || !is_thin) {
            for (const auto& [gradient, needed] : {std::pair(da, needs[1]), std::pair(db, needs[2])})
                if (needed && !factors.empty()) gradient.select(0, group.expert).zero_();
            if (group.rows == 0) return;
        }
        const Tensor group_dy = rows_of(dy, group), group_dx = needs[0] ? rows_of(dx, group) : Tensor();
        Matrix matrix = needs[0] ? matrices.backward(group.expert) : Matrix{};
        const Matrix following = needs[0] && next != nullptr ? matrices.backward(next->expert) : Matrix{};
        if (next != nullptr) matrix.right.following = &following.right.view;
        if (!is_thin) {
            if (needs[0]) multiply(kernels, group_dy, matrix, {}, group_dx);
            return;
        }
        const Tensor a = floats(factors[0].select(0, group.expert)),
                     b = floats(factors[1].select(0, group.expert)),
                     t = at::empty({group.rows, r}, s.options());
        const Tensor expert_da = expert_gradient(da, group.expert, needs[1]),
                     expert_db = expert_gradient(db, group.expert, needs[2]);
        const lora::KeepMask keep = lora::thin_backward(thin, {.dy = group_dy,
                                                               .x = rows_of(rows, group),
                                                               .s = rows_of(s, group),
                                                               .b = b,
                                                               .needs = needs,
                                                               .scale = scale,
                                                               .dropout = dropout,
                                                               .first_row = group.first,
                                                               .t = t,
                                                               .da = expert_da,
                                                               .db = expert_db});
        store(expert_da, da, group.expert);
        store(expert_db, db, group.expert);
        if (!needs[0]) return;
        const Tensor factor = addend_factor(a, matrix.right.transposed, false);
        if (lora::whole_product(kernels, group_dy, matrix.right, {}, {t, factor, keep.mask}, group_dx))
            return;
        multiply(kernels, group_dy, matrix, {}, group_dx);
        lora::up(thin, group_dx, t, lora::arranged_factor(thin.plain, a, false), keep.mask);
    });
    if (needs[0]) no_rows_behind(dx, groups);
    return {dx, da, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("grouped_linear", &grouped_linear);
    m.impl("grouped_linear_backward", &grouped_linear_backward);
}

}  // namespace grouped
}  // namespace peftcore
