// Low-rank products of a single row, directly from A and B: for adapters with few rows, where arranging the factors
// (see blocks.h) costs more than using them. Products and sums are fp32; factors are not rounded.
#pragma once

#include "lora/cpu/blocks.h"

namespace peftcore {
namespace lora {

template <typename Level>
struct Rows {
    using T = typename Level::T;
    using Vector = typename Level::Vector;
    static constexpr int kLanes = Level::kLanes;
    static constexpr int64_t kChain = 64 * kLanes;  // products of a short sum (see blocks.h)
    static constexpr int kParts = 4;  // parallel sums: each product waits for the previous one of its sum
    static constexpr int kShort = 8;  // vectors of a short row

    static void widen(const void* from, int64_t count, float* to) {
        stage_row<Level>(static_cast<const T*>(from), count, nullptr, to);
    }

    static void add(const float* from, int64_t count, void* to) {
        T* y = static_cast<T*>(to);
        for (int64_t n = 0; n < count; n += kLanes)
            store_some<Level>(y + n, count - n,
                              Level::add(load_some<Level>(y + n, count - n), Level::load(from + n)));
    }

    // The product of one row of a factor with x, by lanes.
    static inline Vector products(const float* x, const T* row, int64_t inner) {
        Vector total = Level::zero();
        for (int64_t first = 0; first < inner; first += kChain) {
            const int64_t last = std::min(inner, first + kChain);
            Vector part[kParts];
            for (Vector& one : part) one = Level::zero();
            int64_t j = first;
            for (; j + kParts * kLanes <= last; j += kParts * kLanes)
#pragma GCC unroll 4
                for (int p = 0; p < kParts; ++p)
                    part[p] = Level::fma(Level::load(x + j + p * kLanes), Level::load(row + j + p * kLanes),
                                         part[p]);
            for (; j < last; j += kLanes)
                part[0] = Level::fma(load_some<Level>(x + j, last - j), load_some<Level>(row + j, last - j),
                                     part[0]);
            total = Level::add(total, Level::add(Level::add(part[0], part[1]), Level::add(part[2], part[3])));
        }
        return total;
    }

    // Products of kLanes short rows with x, whose sums stay in registers: one after another, each waits to be stored,
    // and 16 rows of y take four times as long. Memory behind the last row may be read if it is `inside` the matrix.
    static inline void products_of_short(const float* x, const T* rows, int64_t inner, bool inside,
                                         Vector (&totals)[kLanes]) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) totals[i] = Level::zero();
        int64_t j = 0;
        for (; j + kLanes <= inner; j += kLanes) {
            const Vector left = Level::load(x + j);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                totals[i] = Level::fma(left, Level::load(rows + i * inner + j), totals[i]);
        }
        if (j == inner) return;
        const Vector left = load_some<Level>(x + j, inner - j);
        const uint32_t tail_bits = (1u << (inner - j)) - 1;
        if (inside) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                totals[i] =
                    Level::fma(left, Level::keep(Level::load(rows + i * inner + j), tail_bits), totals[i]);
        } else {
            for (int i = 0; i < kLanes; ++i)
                totals[i] = Level::fma(left, load_some<Level>(rows + i * inner + j, inner - j), totals[i]);
        }
    }

    // The sums over j < inner, for i < outer:
    //   out[i] = x[j] factor[i * inner + j]
    // x and out are padded by kLanes values.
    static void multiply(const float* x, const void* matrix, int64_t inner, int64_t outer, float* out) {
        const T* factor = static_cast<const T*>(matrix);
        for (int64_t begin = 0; begin < outer; begin += kLanes) {
            const int64_t count = std::min<int64_t>(kLanes, outer - begin);
            const T* rows = factor + begin * inner;
            Vector totals[kLanes];
            if (count == kLanes && inner <= kShort * kLanes) {
                products_of_short(x, rows, inner, (begin + kLanes) * inner + kLanes <= outer * inner, totals);
            } else {
                for (int i = 0; i < kLanes; ++i)
                    totals[i] = i < count ? products(x, rows + i * inner, inner) : Level::zero();
            }
            Level::store(out + begin, Level::sums(totals));
        }
    }

    static RowKernels kernels() { return {.widen = widen, .add = add, .multiply = multiply}; }
};

}  // namespace lora
}  // namespace peftcore
