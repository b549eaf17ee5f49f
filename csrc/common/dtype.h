// Element types that kernels take, with the numbers that launchers pass.
#pragma once

namespace peftcore {

enum class Dtype { kFloat = 0, kHalf = 1, kBFloat16 = 2 };

constexpr int kDtypes = 3;

// Bytes per value.
constexpr int itemsize(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

}  // namespace peftcore
