// Arguments and table of the attention kernels.
#pragma once

#include <cstdint>

#include "common/dropout.h"

namespace peftcore {
namespace attention {

// [batch, heads, tokens, size]; the strides, in values, of all dimensions but the last, which is contiguous.
struct Heads {
    void* first;
    int64_t batch_stride, head_stride, token_stride;

    template <typename T>
    T* at(int64_t batch, int64_t head, int64_t token) const {
        return static_cast<T*>(first) + batch * batch_stride + head * head_stride + token * token_stride;
    }
};

constexpr int64_t kHeadSizeMultiple = 32;
constexpr int64_t kMostKeys = 4096;  // a block's scores of all keys stay in the L2 cache

// Grouped queries: `group_size` heads of q share a head of k and v.
struct AttentionArgs {
    int64_t key_heads, group_size, queries, keys, size;
    float scale;
    bool causal;
    const uint8_t* mask;  // 0 hides a key; nullptr: all are visible
    int64_t mask_strides[4];
    Dropout dropout;    // of the probabilities [batch * heads * queries, keys]
    float kept_factor;  // by which kept probabilities are scaled
    Heads q, k, v, out;
    float* lse;                      // [batch, heads, queries]
    Heads grad{}, dq{}, dk{}, dv{};  // of the gradient only
};

// For one dtype; ranges count pairs of a sample and a head of k. Where an entry is empty, PyTorch's attention is used.
struct Kernels {
    void (*forward)(const AttentionArgs&, int64_t first, int64_t last) = nullptr;
    void (*backward)(const AttentionArgs&, int64_t first, int64_t last) = nullptr;
};

void fill_avx512bf16(Kernels&);  // of bf16

}  // namespace attention
}  // namespace peftcore
