// LoRA beside few rows of x, whose factors are read as they lie: arranging them takes longer than using them.
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

// For fewer rows than this; of several adapters, where each has fewer than the second.
constexpr int64_t kArrangeFrom = 17, kArrangeEachFrom = 8;

// A factor that RowKernels read, as it is where it can be.
Tensor plain_factor(const Tensor& factor);

// s = factor x aᵀ and y += s bᵀ in pieces, each of one thread, whose sums do not depend on how they are divided. a and b
// are plain, all sizes at least 1; the tensors outlive this.
class SkinnyLora {
 public:
    SkinnyLora(const Kernels& kernels, const Tensor& x, const Tensor& a, const Tensor& b, float factor,
               const Tensor& s, const Tensor& y);

    int64_t down_pieces() const { return ceil_div(r_, kOutputs); }
    void down(int64_t piece) const;
    void up(Range columns) const;  // of y, once all pieces of `down` are done

    // All of one of them, by as many threads as it is worth.
    void down_all() const;
    void up_all() const;

 private:
    static constexpr int64_t kOutputs = 4, kUpOutputs = 256;  // rows of a factor that are taken at once

    const RowKernels &of_x_, &of_a_, &of_b_, &of_y_;
    const int64_t rows_, inner_, columns_, r_, a_row_, b_row_, y_item_;  // of a row and an item the bytes
    const float factor_;
    const char *const x_, *const a_, *const b_;
    char* const y_;
    float* const s_;
};

// All of it in the one go in which threads multiply x by their rows of W, so that they wait for one another once. One
// that has its rows of W before others have their part of `down` leaves `up` of these rows to the end.
class LoraCompanion final : public quant4::Companion {
 public:
    explicit LoraCompanion(const SkinnyLora& lora) : lora_(lora) {}

    void before() override;
    void after(Range rows) override;
    void finish() const;  // behind the product

 private:
    const SkinnyLora& lora_;
    std::atomic<int64_t> next_{0}, done_{0};
    std::mutex mutex_;
    std::vector<Range> left_;
};

}  // namespace lora
}  // namespace peftcore
