// routed, gathered, combined and its gradient on CPU. Schemas and formulas: peftcore/ops/routing.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "weight/linear_arguments.h"

namespace peftcore {
namespace grouped {
namespace {

using at::Tensor;

// Runs a loop over `count` items of `values` values each.
template <typename Body>
void for_all(int64_t count, int64_t values, const Body& body) {
    at::parallel_for(0, count, ceil_div(kValuesPerTask, std::max<int64_t>(1, values)), body);
}

Dtype matrix_dtype(const Tensor& t, const char* op, const char* name) {
    const Dtype dtype = kernel_dtype(t.scalar_type(), op);
    TORCH_CHECK_VALUE(t.dim() == 2, op, ": ", name, " must have two dimensions, found ", t.sizes());
    return dtype;
}

void check_numbers(const Tensor& t, int64_t least, const char* op, const char* name) {
    const int64_t *numbers = t.const_data_ptr<int64_t>(), *end = numbers + t.numel();
    if (numbers == end) return;
    const auto [low, high] = std::minmax_element(numbers, end);
    TORCH_CHECK_VALUE(*low >= 0 && *high < least, op, ": ", name, " must be from 0 to ", least - 1,
                      ", found ", *low, " to ", *high);
}

void check_weights(const Tensor& weights, const Tensor& tokens, const char* op) {
    TORCH_CHECK_TYPE(known_dtype(weights.scalar_type()), op,
                     ": weights must be float32, float16 or bfloat16, found ", weights.scalar_type());
    TORCH_CHECK_VALUE(weights.device() == tokens.device(), op, ": weights must be on ", tokens.device(),
                      ", found ", weights.device());
}

// Counts each expert's pairs and sorts the pairs by expert.
std::tuple<Tensor, Tensor, Tensor> routed(const Tensor& index, int64_t experts) {
    const char* op = "routed";
    check_tensor(index, at::kLong, index.device(), op, "index");
    TORCH_CHECK_VALUE(index.dim() == 2, op, ": index must be [tokens, k], found ", index.sizes());
    TORCH_CHECK_VALUE(experts >= 0, op, ": experts must not be negative, found ", experts);
    const int64_t pairs = index.numel();
    TORCH_CHECK_VALUE(pairs < int64_t(1) << 31, op, ": index must hold less than 2^31 numbers, found ",
                      pairs);
    const Tensor from = index.contiguous(), order = at::empty({pairs}, index.options()),
                 places = at::empty(index.sizes(), index.options()),
                 offsets = at::empty({experts}, index.options().dtype(at::kInt));
    const int64_t* expert = from.const_data_ptr<int64_t>();
    std::vector<int64_t> next(size_t(experts + 2), 0);  // [e + 1]: count of e; the last entry: of no expert
    for (int64_t i = 0; i < pairs; ++i) {
        TORCH_CHECK_VALUE(expert[i] >= 0, op, ": index must not be negative, found ",
                          *std::min_element(expert, expert + pairs));
        ++next[size_t(std::min(expert[i], experts) + 1)];
    }
    int32_t* end = offsets.mutable_data_ptr<int32_t>();
    for (int64_t e = 0; e < experts; ++e) end[e] = int32_t(next[size_t(e + 1)] += next[size_t(e)]);
    int64_t *to_order = order.mutable_data_ptr<int64_t>(), *to_places = places.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t place = next[size_t(std::min(expert[i], experts))]++;
        to_order[place] = i;
        to_places[i] = place;
    }
    return {order, places, offsets};
}

Tensor gathered(const Tensor& x, const Tensor& order, int64_t k) {
    const char* op = "gathered";
    const at::AutoDispatchBelowADInplaceOrView below;
    matrix_dtype(x, op, "x");
    TORCH_CHECK_VALUE(k > 0, op, ": k must be positive, found ", k);
    TORCH_CHECK_VALUE(order.dim() == 1, op, ": order must have one dimension, found ", order.sizes());
    check_tensor(order, at::kLong, x.device(), op, "order");
    const Tensor from = x.contiguous(), pairs = order.contiguous(),
                 y = at::empty({order.size(0), x.size(1)}, x.options());
    int64_t all;
    if (__builtin_mul_overflow(x.size(0), k, &all)) all = std::numeric_limits<int64_t>::max();
    check_numbers(pairs, all, op, "order");
    const int64_t bytes = x.size(1) * int64_t(x.element_size());
    const int64_t* pair = pairs.const_data_ptr<int64_t>();
    const char* rows = static_cast<const char*>(from.const_data_ptr());
    char* out = static_cast<char*>(y.mutable_data_ptr());
    for_all(bytes == 0 ? 0 : y.size(0), x.size(1), [&](int64_t first, int64_t last) {
        for (; first < last; ++first)
            std::memcpy(out + first * bytes, rows + pair[first] / k * bytes, size_t(bytes));
    });
    return y;
}

Tensor combined(const Tensor& y, const std::optional<Tensor>& weights, const Tensor& places) {
    const char* op = "combined";
    const at::AutoDispatchBelowADInplaceOrView below;
    const Dtype dtype = matrix_dtype(y, op, "y");
    check_tensor(places, at::kLong, y.device(), op, "places");
    TORCH_CHECK_VALUE(places.dim() == 2, op, ": places must be [tokens, k], found ", places.sizes());
    at::ScalarType result = y.scalar_type();
    if (weights.has_value()) {
        check_weights(*weights, y, op);
        TORCH_CHECK_VALUE(weights->sizes() == places.sizes(), op, ": weights must be ", places.sizes(),
                          ", found ", weights->sizes());
        result = at::promoteTypes(result, weights->scalar_type());
    }
    const Tensor rows = y.contiguous(), from = places.contiguous(),
                 shares = weights.has_value() ? floats(*weights) : Tensor(),
                 out = at::empty({places.size(0), y.size(1)}, y.options().dtype(result));
    check_numbers(from, y.size(0), op, "places");
    const RowSumArgs args{.y = rows.const_data_ptr(),
                          .columns = y.size(1),
                          .weights = shares.defined() ? shares.const_data_ptr<float>() : nullptr,
                          .places = from.const_data_ptr<int64_t>(),
                          .k = places.size(1),
                          .out = out.mutable_data_ptr(),
                          .wide = result != y.scalar_type()};
    const auto sums = cpu_kernels().row_sum[int(dtype)].sums;
    for_all(places.size(0), y.size(1) * args.k,
            [&](int64_t first, int64_t last) { sums(args, first, last); });
    return out;
}

std::tuple<Tensor, Tensor> combined_backward(const Tensor& grad, const std::optional<Tensor>& y,
                                             const Tensor& weights, const Tensor& order,
                                             std::array<bool, 2> needs) {
    const char* op = "combined_backward";
    const at::AutoDispatchBelowADInplaceOrView below;
    matrix_dtype(grad, op, "grad");
    check_weights(weights, grad, op);
    TORCH_CHECK_VALUE(weights.dim() == 2, op, ": weights must be [tokens, k], found ", weights.sizes());
    TORCH_CHECK_VALUE(grad.size(0) == weights.size(0), op, ": grad must have ", weights.size(0),
                      " rows, found ", grad.sizes());
    check_tensor(order, at::kLong, grad.device(), op, "order");
    const int64_t rows = weights.numel(), columns = grad.size(1);
    TORCH_CHECK_VALUE(order.dim() == 1 && order.size(0) == rows, op, ": order must be [", rows, "], found ",
                      order.sizes());
    Tensor y_rows;
    if (needs[1]) {
        TORCH_CHECK_TYPE(y.has_value(), op, ": y must be a tensor for the gradient of weights, found None");
        matrix_dtype(*y, op, "y");
        TORCH_CHECK_VALUE(y->device() == grad.device(), op, ": y must be on ", grad.device(), ", found ",
                          y->device());
        TORCH_CHECK_VALUE(y->size(0) == rows && y->size(1) == columns, op, ": y must be [", rows, ", ",
                          columns, "], found ", y->sizes());
        y_rows = y->contiguous();
    }
    // Two different 16-bit dtypes, for which PyTorch has no product, go through fp32.
    const bool mixed =
        y_rows.defined() && grad.scalar_type() != at::kFloat && grad.scalar_type() != y_rows.scalar_type();
    const Tensor grad_rows = mixed ? floats(grad) : grad.contiguous(), pairs = order.contiguous(),
                 shares = floats(weights),
                 dy = at::empty(needs[0] ? at::IntArrayRef{rows, columns} : at::IntArrayRef{0},
                                grad_rows.options()),
                 dw = at::zeros(needs[1] ? weights.sizes() : at::IntArrayRef{0}, shares.options());
    check_numbers(pairs, rows, op, "order");
    const Tensor& read = y_rows.defined() ? y_rows : grad_rows;
    const RowSumBackwardArgs args{.grad = grad_rows.const_data_ptr(),
                                  .y = y_rows.defined() ? y_rows.const_data_ptr() : nullptr,
                                  .columns = columns,
                                  .weights = shares.const_data_ptr<float>(),
                                  .order = pairs.const_data_ptr<int64_t>(),
                                  .k = weights.size(1),
                                  .dy = needs[0] ? dy.mutable_data_ptr() : nullptr,
                                  .dw = needs[1] ? dw.mutable_data_ptr<float>() : nullptr,
                                  .wide = grad_rows.scalar_type() != read.scalar_type()};
    const auto backward = cpu_kernels().row_sum[int(kernel_dtype(read.scalar_type(), op))].backward;
    for_all(rows, columns, [&](int64_t first, int64_t last) { backward(args, first, last); });
    return {dy.to(grad.scalar_type()), dw.to(weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("routed", &routed);
    m.impl("gathered", &gathered);
    m.impl("combined", &combined);
    m.impl("combined_backward", &combined_backward);
}

}  // namespace grouped
}  // namespace peftcore
