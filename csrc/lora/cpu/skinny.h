// LoRA for a few rows of x, with factors that are read in place, because rearranging them would take longer than the
// products.
#pragma once

#include <atomic>
#include <mutex>
#include <vector>

#include "common/integers.h"
#include "common/tensors.h"
#include "lora/cpu/kernels.h"
#include "quant4/cpu/linear/linear.h"

namespace peftcore {
namespace lora {

using at::Tensor;

// Rows of x from which factors are arranged, for one adapter and for each of several.
constexpr int64_t kArrangeFrom = 17, kArrangeEachFrom = 8;

// A factor as RowKernels read it, copied only where necessary.
Tensor plain_factor(const Tensor& factor);

// s = factor x aᵀ and y += s bᵀ in pieces, one thread each, with sums that do not depend on how they are divided. a and
// b are plain, all sizes at least 1; the tensors must outlive this object.
class SkinnyLora {
 public:
    SkinnyLora(const Kernels& kernels, const Tensor& x, const Tensor& a, const Tensor& b, float factor,
               const Tensor& s, const Tensor& y);

    int64_t down_pieces() const { return ceil_div(r_, kOutputs); }
    void down(int64_t piece) const;
    void up(Range columns) const;  // of y, once all pieces of `down` are done

    // The whole product, by as many threads as are useful.
    void down_all() const;
    void up_all() const;

 private:
    static constexpr int64_t kOutputs = 4, kUpOutputs = 256;  // rows of a factor that are taken at once

    const RowKernels &x_kernels_, &a_kernels_, &b_kernels_, &y_kernels_;
    const int64_t rows_, inner_, columns_, r_, a_row_, b_row_, y_item_;  // the last three in bytes
    const float factor_;
    const char *const x_, *const a_, *const b_;
    char* const y_;
    float* const s_;
};

// LoRA inside the parallel loop that multiplies x by W, so that threads synchronize only once. A thread that completes
// its rows of W before all of `down` is done leaves `up` of these rows to the end.
class LoraCompanion final : public quant4::Companion {
 public:
    explicit LoraCompanion(const SkinnyLora& lora) : lora_(lora) {}

    void before() override;
    void after(Range rows) override;
    void finish() const;  // after the product

 private:
    const SkinnyLora& lora_;
    std::atomic<int64_t> next_{0}, done_{0};
    std::mutex mutex_;
    std::vector<Range> left_;
};

}  // namespace lora
}  // namespace peftcore
