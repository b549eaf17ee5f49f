// Attention by dot products of bf16: scores and probabilities of 48 queries and all their keys stay in the L2 cache.
//
//   forward     S = c q kᵀ,  P = softmax(S),  out = P v
//   backward    dP = dout vᵀ,  dS = c P ∘ (dP - Σ dout ∘ out),  dq = dS k,  dk = dSᵀ q,  dv = Pᵀ dout
//
// With dropout out and dv have keep ∘ P / (1 - p) in place of P, and dP is keep ∘ dP / (1 - p).
//
// Sums are fp32; P and dS are rounded to bf16 for their products, as in PyTorch's kernel. The gradient computes S again.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/cpu/bf16_products.h"
#include "attention/cpu/score_rows.h"
#include "common/workspace.h"
#include "simd/exponential.h"

namespace peftcore {
namespace attention {
namespace {

constexpr int64_t kBlock = 4 * kTileRows, kBlockPairs = kBlock / 2;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
using KeptKeys = attention::KeptKeys<Avx512>;

// Bits of 16 keys, from `key` on, that are seen or kept.
inline __mmask16 bits_of(const Visible& visible, int64_t key) {
    const int64_t left = visible.end - key;
    if (left <= 0) return 0;
    const __mmask16 before_end = left < 16 ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
    if (visible.mask == nullptr) return before_end;
    if (visible.stride == 0) return visible.mask[0] != 0 ? before_end : __mmask16(0);
    const __m128i values = _mm_maskz_loadu_epi8(before_end, visible.mask + key);
    return _mm_test_epi8_mask(values, values) & before_end;
}
inline __mmask16 bits_of(const KeptKeys& kept_keys, int64_t key) {
    return __mmask16(kept_keys.bits[key / 16]);
}

// e^x for x <= 0; NaN is some number.
inline __m512 exponential_below(__m512 x) {
    const __m512 least = _mm512_set1_ps(-87.0f);
    const __m512 e = __m512(exponential_within(Sixteen(_mm512_max_ps(x, least))));
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_GT_OQ), e);
}

inline void store_bf16(__m512 value, BFloat16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), __m256i(_mm512_cvtneps_pbh(value)));
}

// p = e^(s - the largest) of `count` scores, 0 for keys that are not seen or kept. Returns lse, and 1 / the sum over the
// seen ones. A row that sees no key has an lse of infinity and a factor of 0; of a row that is not finite both are NaN.
struct Softmax {
    float lse, factor;
};

template <bool kDrops>
Softmax softmax(float* s, float scale, const Visible& visible, const KeptKeys& kept_keys, int64_t count,
                BFloat16* p) {
    __m512 most = _mm512_set1_ps(kNegativeInfinity);
    __mmask16 nan = 0;
    for (int64_t n = 0; n < count; n += 16) {
        const __m512 z = _mm512_mask_mul_ps(_mm512_set1_ps(kNegativeInfinity), bits_of(visible, n),
                                            _mm512_loadu_ps(s + n), _mm512_set1_ps(scale));
        nan |= _mm512_cmp_ps_mask(z, z, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, z);
        _mm512_storeu_ps(s + n, z);
    }
    const float largest = _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t n = 0; n < count; n += 16) {
        const __m512 z = _mm512_loadu_ps(s + n);
        const __m512 e = exponential_below(_mm512_sub_ps(z, _mm512_set1_ps(largest)));
        sum = _mm512_add_ps(sum, e);
        store_bf16(kDrops ? _mm512_maskz_mov_ps(bits_of(kept_keys, n), e) : e, p + n);
    }
    constexpr float kInfinity = std::numeric_limits<float>::infinity(),
                    kNan = std::numeric_limits<float>::quiet_NaN();
    if (nan != 0 || largest == kInfinity) return {kNan, kNan};
    if (largest == kNegativeInfinity) {
        std::memset(p, 0, size_t(count) * sizeof *p);
        return {kInfinity, 0.0f};
    }
    const float total = _mm512_reduce_add_ps(sum);
    return {largest + std::log(total), 1.0f / total};
}

struct Sizes {
    int64_t keys, words, key_pairs;  // filled up

    explicit Sizes(const AttentionArgs& args)
        : keys(filled_up(args.keys, kTile)), words(args.size / 2), key_pairs(keys / 2) {}
};

// Buffers of a task, one after another.
struct Buffers {
    uint32_t* next = nullptr;
    int64_t count = 0;

    // `words` words and a vector behind them.
    uint32_t* take(int64_t words) {
        uint32_t* buffer = next + count;
        count += filled_up(words + 16, 16);
        return buffer;
    }
    float* take_floats(int64_t values) { return reinterpret_cast<float*>(take(values)); }
    BFloat16* take_bf16(int64_t values) { return reinterpret_cast<BFloat16*>(take(values / 2)); }
};

struct Forward {
    uint32_t *q, *k, *v, *p;
    float *scores, *out;
    BFloat16* rounded;

    static Forward in(Buffers& buffers, const AttentionArgs& args, const Sizes& sizes) {
        return {.q = buffers.take(kBlock * sizes.words),
                .k = buffers.take(sizes.keys * sizes.words),
                .v = buffers.take(sizes.key_pairs * args.size),
                .p = buffers.take(kBlock * sizes.key_pairs),
                .scores = buffers.take_floats(kBlock * sizes.keys),
                .out = buffers.take_floats(kBlock * args.size),
                .rounded = buffers.take_bf16(kBlock * sizes.keys)};
    }
};

struct Backward {
    uint32_t *q, *grad, *q_right, *grad_right, *k, *k_right, *v, *left;
    float *scores, *slopes, *dq, *dk, *dv;
    BFloat16 *p, *ds;

    static int64_t left_stride(const Sizes& sizes) { return sizes.keys + kTile; }
    static int64_t key_rows(const Sizes& sizes) { return filled_up(sizes.keys, kTileRows); }

    static Backward in(Buffers& buffers, const AttentionArgs& args, const Sizes& sizes) {
        return {.q = buffers.take(kBlock * sizes.words),
                .grad = buffers.take(kBlock * sizes.words),
                .q_right = buffers.take(kBlockPairs * args.size),
                .grad_right = buffers.take(kBlockPairs * args.size),
                .k = buffers.take(sizes.keys * sizes.words),
                .k_right = buffers.take(sizes.key_pairs * args.size),
                .v = buffers.take(sizes.keys * sizes.words),
                .left = buffers.take(std::max(kBlock * sizes.key_pairs, kBlockPairs * left_stride(sizes))),
                .scores = buffers.take_floats(kBlock * sizes.keys),
                .slopes = buffers.take_floats(kBlock * sizes.keys),
                .dq = buffers.take_floats(kBlock * args.size),
                .dk = buffers.take_floats(key_rows(sizes) * args.size),
                .dv = buffers.take_floats(key_rows(sizes) * args.size),
                .p = buffers.take_bf16(kBlock * sizes.keys),
                .ds = buffers.take_bf16(kBlock * sizes.keys)};
    }
};

template <typename Task>
Task buffers_of(const AttentionArgs& args, const Sizes& sizes) {
    Buffers sized;
    Task::in(sized, args, sizes);
    Buffers buffers{static_cast<uint32_t*>(workspace(sized.count * int64_t(sizeof(uint32_t))))};
    return Task::in(buffers, args, sizes);
}

// Queries of a block, and their keys.
struct Block {
    int64_t first, rows, keys;

    Block(const AttentionArgs& args, int64_t first_query)
        : first(first_query),
          rows(std::min(kBlock, args.queries - first)),
          keys(filled_up(args.causal ? std::min(args.keys, first + rows) : args.keys, kTile)) {}
};

template <bool kDrops>
void forward_one(const AttentionArgs& args, const Sizes& sizes, const Forward& at, int64_t batch,
                 int64_t head, int64_t first) {
    const Block block(args, first);
    left_of(args.q.at<BFloat16>(batch, head, first), args.q.token_stride, block.rows, sizes.words, at.q);
    product<false>(at.q, sizes.words * kTileRows, kTileRows, block.rows, at.k, sizes.words * kTile,
                   block.keys, sizes.words, at.scores, sizes.keys);
    float factors[kBlock];
    const int64_t number = (batch * args.key_heads * args.group_size + head) * args.queries + first;
    for (int64_t r = 0; r < block.rows; ++r) {
        const Softmax row =
            softmax<kDrops>(at.scores + r * sizes.keys, args.scale, Visible(args, batch, head, first + r),
                            KeptKeys(args, number + r), block.keys, at.rounded + r * sizes.keys);
        args.lse[number + r] = row.lse;
        factors[r] = row.factor * args.kept_factor;
    }
    left_of(at.rounded, sizes.keys, block.rows, block.keys / 2, at.p);
    product<false>(at.p, block.keys / 2 * kTileRows, kTileRows, block.rows, at.v, sizes.key_pairs * kTile,
                   args.size, block.keys / 2, at.out, args.size);
    store_rows(at.out, args.size, block.rows, args.size, factors, args.out.at<BFloat16>(batch, head, first),
               args.out.token_stride);
}

void forward(const AttentionArgs& args, int64_t first, int64_t last) {
    const Sizes sizes(args);
    const Forward at = buffers_of<Forward>(args, sizes);
    for (; first < last; ++first) {
        const int64_t batch = first / args.key_heads, key_head = first % args.key_heads;
        right_transposed(args.k.at<BFloat16>(batch, key_head, 0), args.k.token_stride, args.keys, sizes.words,
                         at.k);
        right_of(args.v.at<BFloat16>(batch, key_head, 0), args.v.token_stride, args.keys, args.size,
                 sizes.key_pairs, at.v);
        for (int64_t i = 0; i < args.group_size; ++i)
            for (int64_t query = 0; query < args.queries; query += kBlock)
                (args.dropout.threshold != 0
                     ? forward_one<true>
                     : forward_one<false>)(args, sizes, at, batch, key_head * args.group_size + i, query);
    }
}

float dot(const BFloat16* a, const BFloat16* b, int64_t size) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) sum = _mm512_fmadd_ps(load16(a + i), load16(b + i), sum);
    return _mm512_reduce_add_ps(sum);
}

// P, as dv needs it, and dS of a row from scores and dP.
template <bool kDrops>
void slopes_of(const float* s, const float* dp, const AttentionArgs& args, float lse, float delta,
               const Visible& visible, const KeptKeys& kept_keys, int64_t count, BFloat16* p, BFloat16* ds) {
    const __m512 scale = _mm512_set1_ps(args.scale), factor = _mm512_set1_ps(args.kept_factor);
    const __m512 shift = _mm512_set1_ps(lse);
    const __m512 not_finite = _mm512_set1_ps(lse - lse);  // added: 0, or NaN
    for (int64_t n = 0; n < count; n += 16) {
        const __mmask16 there =
            lse == std::numeric_limits<float>::infinity() ? __mmask16(0) : bits_of(visible, n);
        const __m512 z = _mm512_fmsub_ps(_mm512_loadu_ps(s + n), scale, shift);
        const __mmask16 nan = _mm512_cmp_ps_mask(z, z, _CMP_UNORD_Q);
        const __m512 e =
            _mm512_maskz_add_ps(there, exponential_below(z), _mm512_mask_mov_ps(not_finite, nan, z));
        __m512 slope = _mm512_loadu_ps(dp + n);
        if constexpr (kDrops) slope = _mm512_maskz_mul_ps(bits_of(kept_keys, n), slope, factor);
        store_bf16(kDrops ? _mm512_maskz_mul_ps(bits_of(kept_keys, n), e, factor) : e, p + n);
        slope = _mm512_sub_ps(slope, _mm512_set1_ps(delta));
        store_bf16(_mm512_maskz_mul_ps(there, _mm512_mul_ps(e, slope), scale), ds + n);
    }
}

template <bool kDrops>
void backward_one(const AttentionArgs& args, const Sizes& sizes, const Backward& at, int64_t batch,
                  int64_t head, int64_t first) {
    const Block block(args, first);
    const BFloat16 *q = args.q.at<BFloat16>(batch, head, first),
                   *grad = args.grad.at<BFloat16>(batch, head, first),
                   *out = args.out.at<BFloat16>(batch, head, first);
    const int64_t block_words = sizes.words * kTileRows, tile_words = sizes.words * kTile;
    left_of(q, args.q.token_stride, block.rows, sizes.words, at.q);
    left_of(grad, args.grad.token_stride, block.rows, sizes.words, at.grad);
    right_of(q, args.q.token_stride, block.rows, args.size, kBlockPairs, at.q_right);
    right_of(grad, args.grad.token_stride, block.rows, args.size, kBlockPairs, at.grad_right);
    product<false>(at.q, block_words, kTileRows, block.rows, at.k, tile_words, block.keys, sizes.words,
                   at.scores, sizes.keys);
    product<false>(at.grad, block_words, kTileRows, block.rows, at.v, tile_words, block.keys, sizes.words,
                   at.slopes, sizes.keys);
    const int64_t number = (batch * args.key_heads * args.group_size + head) * args.queries + first;
    for (int64_t r = 0; r < block.rows; ++r)
        slopes_of<kDrops>(at.scores + r * sizes.keys, at.slopes + r * sizes.keys, args, args.lse[number + r],
                          dot(grad + r * args.grad.token_stride, out + r * args.out.token_stride, args.size),
                          Visible(args, batch, head, first + r), KeptKeys(args, number + r), block.keys,
                          at.p + r * sizes.keys, at.ds + r * sizes.keys);
    if (block.rows % 2 != 0)
        for (BFloat16* matrix : {at.p, at.ds})
            std::memset(matrix + block.rows * sizes.keys, 0, size_t(block.keys) * sizeof *matrix);
    const int64_t pairs = ceil_div(block.rows, 2), stride = Backward::left_stride(sizes);
    const auto add = [&](const BFloat16* matrix, const uint32_t* right, float* to) {
        left_transposed(matrix, sizes.keys, pairs, block.keys, at.left, stride);
        product<true>(at.left, kTileRows, stride, block.keys, right, kBlockPairs * kTile, args.size, pairs,
                      to, args.size);
    };
    add(at.p, at.grad_right, at.dv);
    add(at.ds, at.q_right, at.dk);
    left_of(at.ds, sizes.keys, block.rows, block.keys / 2, at.left);
    product<false>(at.left, block.keys / 2 * kTileRows, kTileRows, block.rows, at.k_right,
                   sizes.key_pairs * kTile, args.size, block.keys / 2, at.dq, args.size);
    store_rows(at.dq, args.size, block.rows, args.size, nullptr, args.dq.at<BFloat16>(batch, head, first),
               args.dq.token_stride);
}

void backward(const AttentionArgs& args, int64_t first, int64_t last) {
    const Sizes sizes(args);
    const Backward at = buffers_of<Backward>(args, sizes);
    for (; first < last; ++first) {
        const int64_t batch = first / args.key_heads, key_head = first % args.key_heads;
        const BFloat16* k = args.k.at<BFloat16>(batch, key_head, 0);
        right_transposed(k, args.k.token_stride, args.keys, sizes.words, at.k);
        right_of(k, args.k.token_stride, args.keys, args.size, sizes.key_pairs, at.k_right);
        right_transposed(args.v.at<BFloat16>(batch, key_head, 0), args.v.token_stride, args.keys, sizes.words,
                         at.v);
        const size_t sums = size_t(Backward::key_rows(sizes) * args.size) * sizeof(float);
        std::memset(at.dk, 0, sums);
        std::memset(at.dv, 0, sums);
        for (int64_t i = 0; i < args.group_size; ++i)
            for (int64_t query = 0; query < args.queries; query += kBlock)
                (args.dropout.threshold != 0
                     ? backward_one<true>
                     : backward_one<false>)(args, sizes, at, batch, key_head * args.group_size + i, query);
        store_rows(at.dk, args.size, args.keys, args.size, nullptr, args.dk.at<BFloat16>(batch, key_head, 0),
                   args.dk.token_stride);
        store_rows(at.dv, args.size, args.keys, args.size, nullptr, args.dv.at<BFloat16>(batch, key_head, 0),
                   args.dv.token_stride);
    }
}

}  // namespace

void fill_avx512bf16(Kernels& kernels) { kernels = {.forward = forward, .backward = backward}; }

}  // namespace attention
}  // namespace peftcore
