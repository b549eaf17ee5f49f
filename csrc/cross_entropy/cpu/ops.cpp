// cross_entropy_rows_ and linear_cross_entropy_rows on CPU. Schemas and formulas: peftcore/ops/cross_entropy.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "cross_entropy/arguments.h"
#include "gemm/cpu/matrices.h"
#include "gemm/cpu/skinny/linear.h"
#include "lora/cpu/frozen.h"
#include "weight/linear_arguments.h"

namespace peftcore {
namespace cross_entropy {
namespace {

using at::Tensor;

constexpr int64_t kLogitsPerTask = 8192;  // each with two exponentials

// What an operator reads and writes for rows of logits.
struct LogitRows {
    Tensor labels, weights, statistics;
    CrossEntropyArgs args;

    LogitRows(int64_t rows, int64_t classes, const Tensor& label_tensor,
              const std::optional<Tensor>& class_weight, const std::optional<Tensor>& grad_scale,
              const CrossEntropySettings& numbers, int64_t ignore_index, bool gradient)
        : labels(label_tensor.contiguous()),
          weights(class_weight.has_value() ? class_weight->contiguous() : Tensor()),
          statistics(at::empty({3, rows}, label_tensor.options().dtype(at::kFloat))) {
        float* out = statistics.mutable_data_ptr<float>();
        args = {.x = nullptr,
                .columns = classes,
                .labels = labels.const_data_ptr<int64_t>(),
                .weights = weights.defined() ? weights.const_data_ptr<float>() : nullptr,
                .total_weight = weights.defined() ? weights.sum(at::kDouble).item<double>() : double(classes),
                .smoothing = numbers.smoothing,
                .z_loss = numbers.z_loss,
                .scale = float(numbers.scale),
                .cap = float(numbers.cap),
                .grad_scale = grad_scale.has_value() ? grad_scale->const_data_ptr<float>() : nullptr,
                .ignore_index = ignore_index,
                .gradient = gradient,
                .loss = out,
                .lse = out + rows,
                .entropy = out + 2 * rows};
    }
};

Tensor cross_entropy_rows(const Tensor& logits, const Tensor& labels,
                          const std::optional<Tensor>& class_weight, const std::optional<Tensor>& grad_scale,
                          at::ArrayRef<double> settings, int64_t ignore_index, bool gradient) {
    const char* op = "cross_entropy_rows_";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_cross_entropy(logits, labels, class_weight, grad_scale, op);
    const CrossEntropySettings numbers = checked_settings(settings, op);
    const int64_t rows = logits.size(0), columns = logits.size(1);
    LogitRows call(rows, columns, labels, class_weight, grad_scale, numbers, ignore_index, gradient);
    call.args.x = logits.mutable_data_ptr();
    const auto kernel = cpu_kernels().cross_entropy[int(kernel_dtype(logits.scalar_type(), op))].rows;
    at::parallel_for(0, rows, ceil_div(kLogitsPerTask, columns),
                     [&](int64_t first, int64_t last) { kernel(call.args, first, last); });
    return call.statistics;
}

// Rows that read the weight together: their sums, and their logits of a block, stay in the L3 cache.
constexpr int64_t kMostRows = 1024;

// Losses of a row from its sums, and the factors of its gradient: of the sum over the other classes, and of its label's
// row of W.
struct RowFactors {
    float others, label;
};

RowFactors finish_row(const CrossEntropyArgs& args, const ClassSums& sums, int64_t row) {
    const int64_t label = args.labels[row];
    const bool valid = label >= 0 && label < args.columns;
    const double invalid = valid ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    const double of_label = args.weights == nullptr || !valid ? 1.0 : double(args.weights[label]);
    const double log = std::log(sums.exponentials), lse = sums.maximum + log, z = sums.label;
    args.loss[row] = float(of_label * ((double(sums.maximum) - z) + log) + args.z_loss * lse * lse + invalid);
    args.lse[row] = float(lse);
    args.entropy[row] = float(log - sums.products / sums.exponentials + (lse - lse));
    // NaN, where a logit is not finite and no mask.
    const double uniform = args.smoothing / double(args.columns) * args.total_weight;
    const double of_softmax = (of_label + uniform + 2 * args.z_loss * lse) / sums.exponentials + (lse - lse);
    const double factor = args.scale * (args.grad_scale == nullptr ? 1.0 : double(*args.grad_scale));
    const double tangent = args.cap == 0 ? 0.0 : z / args.cap;
    const double at_label = std::exp(z - sums.maximum) * of_softmax - of_label + invalid;
    return {float(of_softmax * factor), float(at_label * factor * (1.0 - tangent * tangent))};
}

// Products with a block of classes after another: their logits, which join each row's sums over the classes, and the
// gradient of x from the exponentials that take their places. It is scaled where a row's maximum rises, and at the end.
class ClassBlockProducts {
 public:
    ClassBlockProducts(const CpuKernels& kernels, const Tensor& x, const Tensor& weight, const Tensor& bias,
                       const CrossEntropyArgs& args)
        : kernels_(kernels),
          products_(lora::many_rows(kernels, x)),
          x_(x),
          weight_(weight),
          bias_(bias),
          args_(args),
          most_rows_(std::min(kMostRows, x.size(0))),
          logits_(at::empty({most_rows_, std::min(kMostClasses, weight.size(0))}, x.options())) {
        if (args.gradient)
            sums_ = at::empty({gemm::sums_size(products_.kernel, most_rows_, x.size(1))},
                              x.options().dtype(at::kFloat));
    }

    void run(const Tensor& grad) {
        const int64_t rows = x_.size(0), size = ceil_div(rows, ceil_div(rows, most_rows_));
        for (int64_t first = 0; first < rows; first += size) group(first, std::min(size, rows - first), grad);
    }

 private:
    void group(int64_t row, int64_t rows, const Tensor& grad) {
        std::vector<ClassSums> sums(size_t(rows), ClassSums{});
        if (args_.gradient) sums_.zero_();
        gemm::Product grad_product{};
        for (int64_t first = 0; first < args_.columns; first += kMostClasses) {
            const int64_t classes = std::min(kMostClasses, args_.columns - first);
            const Tensor block = weight_.narrow(0, first, classes);
            const WeightView view = gemm::view_of(block);
            const Tensor x = x_.narrow(0, row, rows),
                         logits = logits_.view({-1}).narrow(0, 0, rows * classes).view({rows, classes}),
                         bias = bias_.defined() ? bias_.narrow(0, first, classes) : bias_;
            gemm::multiply(products_.kernel,
                           gemm::product_of(x, *gemm::tiles_of(products_, view, true), bias, logits));
            ClassBlockArgs args{.logits = args_, .first = first, .sums = sums.data()};
            args.logits.x = logits.mutable_data_ptr();
            args.logits.columns = classes;
            args.logits.labels += row;
            grad_product = {.x = args.logits.x,
                            .dtype = kernel_dtype(x.scalar_type(), "linear_cross_entropy_rows"),
                            .right = *gemm::tiles_of(products_, view, false),
                            .rows = rows,
                            .inner = classes,
                            .columns = x.size(1),
                            .y = nullptr,
                            .sums = args_.gradient ? sums_.mutable_data_ptr<float>() : nullptr,
                            .sum_rows = rows};
            const auto kernel = kernels_.cross_entropy[int(grad_product.dtype)].class_block;
            at::parallel_for(0, rows, ceil_div(kLogitsPerTask, classes), [&](int64_t begin, int64_t end) {
                kernel(args, begin, end);
                for (int64_t m = begin; args_.gradient && m < end; ++m)
                    if (sums[size_t(m)].rescaled != 1)
                        gemm::scale_sums(products_.kernel, grad_product, m, sums[size_t(m)].rescaled);
            });
            if (args_.gradient) gemm::multiply(products_.kernel, grad_product);
        }
        finish(row, grad_product, sums, grad);
    }

    void finish(int64_t first_row, const gemm::Product& grad_product, const std::vector<ClassSums>& sums,
                const Tensor& grad) {
        switch (grad_product.dtype) {
            case Dtype::kFloat:
                return finish_as<float>(first_row, grad_product, sums, grad);
            case Dtype::kHalf:
                return finish_as<Half>(first_row, grad_product, sums, grad);
            case Dtype::kBFloat16:
                return finish_as<BFloat16>(first_row, grad_product, sums, grad);
        }
    }

    template <typename T>
    void finish_as(int64_t first_row, const gemm::Product& grad_product, const std::vector<ClassSums>& sums,
                   const Tensor& grad) {
        const int64_t columns = x_.size(1);
        at::parallel_for(
            0, grad_product.rows, ceil_div(kValuesPerTask, columns), [&](int64_t first, int64_t last) {
                std::vector<float> others(size_t(columns), 0.0f);
                for (int64_t m = first; m < last; ++m) {
                    const int64_t row = first_row + m, label = args_.labels[row];
                    if (label == args_.ignore_index) {
                        args_.loss[row] = args_.lse[row] = args_.entropy[row] = 0;
                        continue;  // its gradient is zero already
                    }
                    const RowFactors factors = finish_row(args_, sums[size_t(m)], row);
                    if (!args_.gradient) continue;
                    gemm::read_sums(products_.kernel, grad_product, m, others.data());
                    const int64_t target = label >= 0 && label < args_.columns ? label : 0;
                    const auto* w = static_cast<const T*>(weight_.const_data_ptr()) + target * columns;
                    auto* out = static_cast<T*>(grad.mutable_data_ptr()) + row * columns;
                    for (int64_t k = 0; k < columns; ++k)
                        out[k] = from_float<T>(factors.others * others[size_t(k)] +
                                               factors.label * to_float(w[k]));
                }
            });
    }

    const CpuKernels& kernels_;
    const gemm::ManyRows& products_;
    const Tensor &x_, &weight_, &bias_;
    const CrossEntropyArgs& args_;
    const int64_t most_rows_;
    const Tensor logits_;
    Tensor sums_;
};

std::tuple<Tensor, Tensor> linear_cross_entropy_rows(const Tensor& hidden, const Tensor& weight,
                                                     const std::optional<Tensor>& bias, const Tensor& labels,
                                                     const std::optional<Tensor>& class_weight,
                                                     const std::optional<Tensor>& grad_scale,
                                                     at::ArrayRef<double> settings, bool gradient,
                                                     int64_t ignore_index) {
    const char* op = "linear_cross_entropy_rows";
    const at::AutoDispatchBelowADInplaceOrView below;
    check_linear(hidden, Weight(weight, {}, op), bias, op);
    TORCH_CHECK_VALUE(hidden.dim() == 2, op, ": x must be [rows, in], found ", hidden.sizes());
    const int64_t rows = hidden.size(0), classes = weight.size(0);
    TORCH_CHECK_VALUE(classes > 0, op, ": weight must have a row for each class, found ", weight.sizes());
    check_labels(labels, class_weight, grad_scale, rows, classes, hidden.device(), op);
    const CrossEntropySettings numbers = checked_settings(settings, op);
    const CpuKernels& kernels = cpu_kernels();
    const Tensor x = hidden.contiguous(), added = contiguous(bias);
    const gemm::ManyRows& products = lora::many_rows(kernels, x);
    if (rows * x.size(1) == 0 || numbers.smoothing != 0 || !weight.is_contiguous() ||
        !products.kernel.by_rows || rows < products.least_rows) {
        const Tensor logits = gemm::dense_linear(x, weight, added).contiguous();
        const Tensor statistics =
            cross_entropy_rows(logits, labels, class_weight, grad_scale, settings, ignore_index, gradient);
        if (!gradient) return {statistics, at::empty({0}, x.options())};
        const Tensor ignored = labels.eq(ignore_index).unsqueeze(1);
        return {statistics, gemm::dense_linear(logits, weight.t(), {}).masked_fill_(ignored, 0)};
    }
    const LogitRows call(rows, classes, labels, class_weight, grad_scale, numbers, ignore_index, gradient);
    const Tensor grad = gradient ? at::zeros(x.sizes(), x.options()) : at::empty({0}, x.options());
    ClassBlockProducts(kernels, x, weight, added, call.args).run(grad);
    return {call.statistics, grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("cross_entropy_rows_", &cross_entropy_rows);
    m.impl("linear_cross_entropy_rows", &linear_cross_entropy_rows);
}

}  // namespace cross_entropy
}  // namespace peftcore
