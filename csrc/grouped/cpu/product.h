// Products of one expert's rows with its frozen matrix, by the fastest way for their sizes on this machine. Results do
// not depend on the number of threads, nor on whether they are computed inside a loop over experts.
#pragma once

#include "grouped/cpu/groups.h"
#include "lora/cpu/frozen.h"

namespace peftcore {
namespace grouped {

using at::Tensor;

// W_e or W_eᵀ as the right operand of an expert's rows.
struct Matrix {
    lora::Right right;
    Tensor dense;  // as it is stored, any strides; undefined in 4 bits
};

// The matrices of a weight, which must outlive this object.
class Matrices {
 public:
    // y = x W_eᵀ for a weight [experts, out, in]; x W_e for one that is stored [experts, in, out].
    Matrices(const Weight& weight, bool transposed, const char* op);

    Matrix forward(int64_t expert) const { return matrix_of(expert, !flipped_); }
    Matrix backward(int64_t expert) const { return matrix_of(expert, flipped_); }

 private:
    Matrix matrix_of(int64_t expert, bool transposed) const;

    const Weight& weight_;
    const char* op_;
    bool flipped_;
    Tensor dense_;  // [experts, .., ..], with strides as close to contiguous as possible; undefined in 4 bits
};

// y = x right + bias for the rows of one expert in x and y of all experts, directly from 4 bits; false where no kernel
// does that. It makes no tensors for the expert, which for one row take a third of the time.
bool multiply_few(const CpuKernels& kernels, const Tensor& x, const Group& group, const Matrix& matrix,
                  const Tensor& bias, const Tensor& y);

// y = x right + bias; `bias` may be undefined. x and y are contiguous.
void multiply(const CpuKernels& kernels, const Tensor& x, const Matrix& matrix, const Tensor& bias,
              const Tensor& y);

}  // namespace grouped
}  // namespace peftcore
