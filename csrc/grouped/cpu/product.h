// The products of one expert's rows with its frozen matrix, by whichever way is fastest for their sizes here. Bits do
// not depend on the number of threads, nor on whether a loop over experts is around them.
#pragma once

#include "grouped/cpu/groups.h"
#include "lora/cpu/frozen.h"

namespace peftcore {
namespace grouped {

using at::Tensor;

// W_e, or Wᵀ_e, on the right of an expert's rows.
struct Matrix {
    lora::Right right;
    Tensor dense;  // as it is stored, any strides; undefined in 4 bits
};

// Those of a weight, which must outlive it.
class Matrices {
 public:
    // y = x W_eᵀ for a weight [experts, out, in]; x W_e for one that is stored [experts, in, out].
    Matrices(const Weight& weight, bool transposed, const char* op);

    Matrix forward(int64_t expert) const { return of(expert, !flipped_); }
    Matrix backward(int64_t expert) const { return of(expert, flipped_); }

 private:
    Matrix of(int64_t expert, bool transposed) const;

    const Weight& weight_;
    const char* op_;
    bool flipped_;
    Tensor dense_;  // [experts, .., ..], each as near to contiguous as it can be; undefined in 4 bits
};

// y = x right + bias, if any, for the rows of one expert in x and y of all; where kernels read few rows straight from 4
// bits, else false. Without a tensor for each expert: for a row that is a third of the time.
bool multiply_few(const CpuKernels& kernels, const Tensor& x, const Group& group, const Matrix& matrix,
                  const Tensor& bias, const Tensor& y);

// y = x right + bias, if any. x and y are contiguous.
void multiply(const CpuKernels& kernels, const Tensor& x, const Matrix& matrix, const Tensor& bias,
              const Tensor& y);

}  // namespace grouped
}  // namespace peftcore
