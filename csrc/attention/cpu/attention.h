// Attention with sums in fp32, for any dtype: scores and probabilities of kBlock queries and all their keys stay in the
// L2 cache. Formulas: peftcore/ops/attention.py.
//
// Right factors are stored as panels of kPanel columns, with inner index p of column c at p * kPanel + c. The inner
// dimension is divided into chains: a chain of a panel fits in the L1 cache, and short sums have smaller rounding errors.
#pragma once

#include "attention/cpu/score_rows.h"
#include "common/workspace.h"
#include "simd/products.h"

namespace peftcore {
namespace attention {

template <typename Level>
struct Attention {
    using T = typename Level::T;
    using Vector = typename Level::Vector;
    using Products = simd::Products<Level>;
    static constexpr int64_t kLanes = Level::kLanes, kRows = Level::kRows;
    static constexpr int64_t kBlock = 48, kPanel = 32, kChain = 128;
    static_assert(kBlock % kRows == 0 && kPanel % (2 * kLanes) == 0 && kHeadSizeMultiple % kPanel == 0);
    using Rows = ScoreRows<Level>;
    using KeptKeys = attention::KeptKeys<Level>;

    // Buffers of a task, one after another.
    struct Buffers {
        float* next = nullptr;
        int64_t count = 0;

        float* take(int64_t values) {
            float* buffer = next + count;
            count += filled_up(values, kSixteen);
            return buffer;
        }
    };

    // The stride of the scores is not a power of two, which would map all rows to a few cache sets.
    struct Sizes {
        int64_t size, keys, stride, key_rows;

        explicit Sizes(const AttentionArgs& args)
            : size(args.size),
              keys(filled_up(args.keys, kPanel)),
              stride(keys + kSixteen),
              key_rows(filled_up(keys, kRows)) {}
    };

    struct Forward {
        float *q, *k, *v, *scores, *out;

        static Forward in(Buffers& buffers, const Sizes& sizes) {
            return {.q = buffers.take(kBlock * sizes.size),
                    .k = buffers.take(sizes.keys * sizes.size),
                    .v = buffers.take(sizes.keys * sizes.size),
                    .scores = buffers.take(kBlock * sizes.stride),
                    .out = buffers.take(kBlock * sizes.size)};
        }
    };

    struct Backward {
        float *q, *grad, *q_right, *grad_right, *k, *k_right, *v, *scores, *slopes, *dq, *dk, *dv;

        static Backward in(Buffers& buffers, const Sizes& sizes) {
            const int64_t block = kBlock * sizes.size, all = sizes.keys * sizes.size,
                          sums = sizes.key_rows * sizes.size;
            return {.q = buffers.take(block),
                    .grad = buffers.take(block),
                    .q_right = buffers.take(block),
                    .grad_right = buffers.take(block),
                    .k = buffers.take(all),
                    .k_right = buffers.take(all),
                    .v = buffers.take(all),
                    .scores = buffers.take(kBlock * sizes.stride),
                    .slopes = buffers.take(kBlock * sizes.stride),
                    .dq = buffers.take(block),
                    .dk = buffers.take(sums),
                    .dv = buffers.take(sums)};
        }
    };

    template <typename Task>
    static Task buffers_of(const Sizes& sizes) {
        Buffers sized;
        Task::in(sized, sizes);
        Buffers buffers{static_cast<float*>(workspace(sized.count * int64_t(sizeof(float))))};
        return Task::in(buffers, sizes);
    }

    // Queries of a block, and their keys.
    struct Block {
        int64_t first, rows, keys;

        Block(const AttentionArgs& args, int64_t first_query)
            : first(first_query),
              rows(std::min(kBlock, args.queries - first)),
              keys(filled_up(args.causal ? std::min(args.keys, first + rows) : args.keys, kPanel)) {}
        int64_t whole_rows() const { return filled_up(rows, kRows); }
    };

    // Rows as a left factor, followed by zeros.
    static void left_of(const T* from, int64_t stride, const Block& block, int64_t size, float* out) {
        for (int64_t r = 0; r < block.rows; ++r)
            for (int64_t i = 0; i < size; i += kLanes)
                Level::store(out + r * size + i, Level::load(from + r * stride + i));
        std::fill(out + block.rows * size, out + block.whole_rows() * size, 0.0f);
    }

    // `rows` rows as a right factor of `inner` rows, the missing ones zero.
    static void right_of(const T* from, int64_t stride, int64_t rows, int64_t inner, int64_t size,
                         float* out) {
        for (int64_t r = 0; r < inner; ++r)
            for (int64_t i = 0; i < size; i += kLanes)
                Level::store(out + i / kPanel * inner * kPanel + r * kPanel + i % kPanel,
                             r < rows ? Level::load(from + r * stride + i) : Level::zero());
    }

    // The transpose of `rows` rows as a right factor, missing columns zero.
    static void right_transposed(const T* from, int64_t stride, int64_t rows, int64_t size, float* out) {
        for (int64_t r = 0; r < filled_up(rows, kPanel); r += kLanes) {
            float* to = out + r / kPanel * size * kPanel + r % kPanel;
            for (int64_t i = 0; i < size; i += kLanes) {
                Vector block[kLanes];
                for (int64_t j = 0; j < kLanes; ++j)
                    block[j] = r + j < rows ? Level::load(from + (r + j) * stride + i) : Level::zero();
                if constexpr (Transposes<Level>) {
                    Level::transpose(block);
                    for (int64_t j = 0; j < kLanes; ++j) Level::store(to + (i + j) * kPanel, block[j]);
                } else {
                    float values[kLanes][kLanes];
                    for (int64_t j = 0; j < kLanes; ++j) Level::store(values[j], block[j]);
                    for (int64_t j = 0; j < kLanes; ++j)
                        for (int64_t k = 0; k < kLanes; ++k) to[(i + j) * kPanel + k] = values[k][j];
                }
            }
        }
    }

    // A left factor, with inner index p of row r at r * row + p * inner.
    struct Left {
        const float* first;
        int64_t row, inner;
    };

    struct Tile {
        const Left& left;
        const float* right;
        int64_t inner;
        float* c;
        int64_t stride;
        bool add;

        template <int R, int V>
        inline void run(int64_t m, int64_t n) const {
            Vector sums[R][V];
            Products::template multiply<R, V>(left.first + m * left.row, left.row, left.inner, right + n,
                                              kPanel, inner, sums);
            float* to = c + m * stride + n;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    float* at = to + r * stride + v * kLanes;
                    Level::store(at, add ? Level::add(Level::load(at), sums[r][v]) : sums[r][v]);
                }
        }
    };

    // c [rows, columns] = left right, or c += left right with `add`. `rows` are whole blocks and `columns` whole panels; a
    // panel of `right` has `panel_rows` rows.
    static void product(const Left& left, const float* right, int64_t panel_rows, int64_t rows,
                        int64_t columns, int64_t inner, float* c, int64_t stride, bool add) {
        for (int64_t p = 0; p < inner; p += kChain) {
            const Left part{left.first + p * left.inner, left.row, left.inner};
            for (int64_t n = 0; n < columns; n += kPanel) {
                const Tile tile{.left = part,
                                .right = right + n * panel_rows + p * kPanel,
                                .inner = std::min(kChain, inner - p),
                                .c = c + n,
                                .stride = stride,
                                .add = add || p != 0};
                for (int64_t m = 0; m < rows; m += kRows)
                    for (int64_t i = 0; i < kPanel; i += 2 * kLanes) tile.template run<int(kRows), 2>(m, i);
            }
        }
    }

    static void store_rows(const float* from, int64_t rows, int64_t size, const float* factors, T* to,
                           int64_t to_stride) {
        for (int64_t r = 0; r < rows; ++r) {
            const Vector factor = Level::set(factors == nullptr ? 1.0f : factors[r]);
            for (int64_t i = 0; i < size; i += kLanes)
                Level::store(to + r * to_stride + i, Level::mul(Level::load(from + r * size + i), factor));
        }
    }

    template <bool kDrops>
    static void forward_one(const AttentionArgs& args, const Sizes& sizes, const Forward& at, int64_t batch,
                            int64_t head, int64_t first) {
        const Block block(args, first);
        left_of(args.q.at<T>(batch, head, first), args.q.token_stride, block, sizes.size, at.q);
        product({at.q, sizes.size, 1}, at.k, sizes.size, block.whole_rows(), block.keys, sizes.size,
                at.scores, sizes.stride, false);
        float factors[kBlock];
        const int64_t number = (batch * args.key_heads * args.group_size + head) * args.queries + first;
        for (int64_t r = 0; r < block.rows; ++r) {
            const typename Rows::Softmax row = Rows::template softmax<kDrops>(
                at.scores + r * sizes.stride, args.scale, Visible(args, batch, head, first + r),
                KeptKeys(args, number + r), block.keys);
            args.lse[number + r] = row.lse;
            factors[r] = row.factor * args.kept_factor;
        }
        product({at.scores, sizes.stride, 1}, at.v, sizes.keys, block.whole_rows(), sizes.size, block.keys,
                at.out, sizes.size, false);
        store_rows(at.out, block.rows, sizes.size, factors, args.out.at<T>(batch, head, first),
                   args.out.token_stride);
    }

    static void forward(const AttentionArgs& args, int64_t first, int64_t last) {
        const Sizes sizes(args);
        const Forward at = buffers_of<Forward>(sizes);
        for (; first < last; ++first) {
            const int64_t batch = first / args.key_heads, key_head = first % args.key_heads;
            right_transposed(args.k.at<T>(batch, key_head, 0), args.k.token_stride, args.keys, sizes.size,
                             at.k);
            right_of(args.v.at<T>(batch, key_head, 0), args.v.token_stride, args.keys, sizes.keys, sizes.size,
                     at.v);
            for (int64_t i = 0; i < args.group_size; ++i)
                for (int64_t query = 0; query < args.queries; query += kBlock)
                    (args.dropout.threshold != 0
                         ? forward_one<true>
                         : forward_one<false>)(args, sizes, at, batch, key_head * args.group_size + i, query);
        }
    }

    static float dot(const T* a, const T* b, int64_t size) {
        Vector sum = Level::zero();
        for (int64_t i = 0; i < size; i += kLanes)
            sum = Level::fma(Level::load(a + i), Level::load(b + i), sum);
        float lanes[kLanes], total = 0;
        Level::store(lanes, sum);
        for (int64_t j = 0; j < kLanes; ++j) total += lanes[j];
        return total;
    }

    template <bool kDrops>
    static void backward_one(const AttentionArgs& args, const Sizes& sizes, const Backward& at, int64_t batch,
                             int64_t head, int64_t first) {
        const Block block(args, first);
        const T *q = args.q.at<T>(batch, head, first), *grad = args.grad.at<T>(batch, head, first),
                *out = args.out.at<T>(batch, head, first);
        const int64_t size = sizes.size, rows = block.whole_rows();
        left_of(q, args.q.token_stride, block, size, at.q);
        left_of(grad, args.grad.token_stride, block, size, at.grad);
        right_of(q, args.q.token_stride, block.rows, kBlock, size, at.q_right);
        right_of(grad, args.grad.token_stride, block.rows, kBlock, size, at.grad_right);
        product({at.q, size, 1}, at.k, size, rows, block.keys, size, at.scores, sizes.stride, false);
        product({at.grad, size, 1}, at.v, size, rows, block.keys, size, at.slopes, sizes.stride, false);
        const int64_t number = (batch * args.key_heads * args.group_size + head) * args.queries + first;
        for (int64_t r = 0; r < block.rows; ++r)
            Rows::template slopes_of<kDrops>(
                at.scores + r * sizes.stride, at.slopes + r * sizes.stride, args, args.lse[number + r],
                dot(grad + r * args.grad.token_stride, out + r * args.out.token_stride, size),
                Visible(args, batch, head, first + r), KeptKeys(args, number + r), block.keys);
        const int64_t keys = filled_up(block.keys, kRows);
        for (int64_t r = 0; r < block.rows; ++r)
            for (float* row : {at.scores + r * sizes.stride, at.slopes + r * sizes.stride})
                std::fill(row + block.keys, row + keys, 0.0f);
        product({at.scores, 1, sizes.stride}, at.grad_right, kBlock, keys, size, block.rows, at.dv, size,
                true);
        product({at.slopes, 1, sizes.stride}, at.q_right, kBlock, keys, size, block.rows, at.dk, size, true);
        product({at.slopes, sizes.stride, 1}, at.k_right, sizes.keys, rows, size, block.keys, at.dq, size,
                false);
        store_rows(at.dq, block.rows, size, nullptr, args.dq.at<T>(batch, head, first), args.dq.token_stride);
    }

    static void backward(const AttentionArgs& args, int64_t first, int64_t last) {
        const Sizes sizes(args);
        const Backward at = buffers_of<Backward>(sizes);
        const int64_t size = sizes.size;
        for (; first < last; ++first) {
            const int64_t batch = first / args.key_heads, key_head = first % args.key_heads;
            const T* k = args.k.at<T>(batch, key_head, 0);
            right_transposed(k, args.k.token_stride, args.keys, size, at.k);
            right_of(k, args.k.token_stride, args.keys, sizes.keys, size, at.k_right);
            right_transposed(args.v.at<T>(batch, key_head, 0), args.v.token_stride, args.keys, size, at.v);
            std::fill_n(at.dk, sizes.key_rows * size, 0.0f);
            std::fill_n(at.dv, sizes.key_rows * size, 0.0f);
            for (int64_t i = 0; i < args.group_size; ++i)
                for (int64_t query = 0; query < args.queries; query += kBlock)
                    (args.dropout.threshold != 0 ? backward_one<true>
                                                 : backward_one<false>)(args, sizes, at, batch,
                                                                        key_head * args.group_size + i,
                                                                        query);
            store_rows(at.dk, args.keys, size, nullptr, args.dk.at<T>(batch, key_head, 0),
                       args.dk.token_stride);
            store_rows(at.dv, args.keys, size, nullptr, args.dv.at<T>(batch, key_head, 0),
                       args.dv.token_stride);
        }
    }

    static attention::Kernels kernels() { return {.forward = forward, .backward = backward}; }
};

}  // namespace attention
}  // namespace peftcore
