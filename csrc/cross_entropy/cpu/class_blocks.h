// Blocks of classes of logits, for a cross-entropy whose logits are never all in memory, as cross_entropy.h computes it of
// whole rows. A block takes one exponential of each logit.
#pragma once

#include "cross_entropy/cpu/cross_entropy.h"

namespace peftcore {
namespace cross_entropy {

template <typename Level>
struct ClassBlocks {
    using T = typename Level::T;
    using Rows = CrossEntropy<Level>;
    using Chunk = typename Rows::Chunk;
    static constexpr int64_t kMost = kMostClasses / kChunk;

    // Adds the chunk's exponentials, which take its place.
    static void add(const CrossEntropyArgs& args, Chunk& chunk, ClassSums& sums) {
        const float maximum = sums.maximum, inverse = args.cap == 0 ? 0.0f : 1.0f / args.cap;
        Sixteen exponentials{}, products{};
        for (int64_t i = 0; i < kChunk; i += kSixteen) {
            Sixteen& z = sixteen_at(chunk.value + i);
            const Below below(z - maximum);
            exponentials += below.exponential;
            products += below.exponential * below.value;
            const Sixteen tangent = z * inverse;
            z = args.cap == 0 ? below.exponential : below.exponential * (1.0f - tangent * tangent);
        }
        for (int64_t j = 0; j < kSixteen; ++j) {
            sums.exponentials += exponentials[j];
            sums.products += products[j];
        }
    }

    static void add_row(const ClassBlockArgs& args, int64_t index, Chunk (&chunks)[kMost]) {
        const CrossEntropyArgs& logits = args.logits;
        T* row = static_cast<T*>(logits.x) + index * logits.columns;
        ClassSums& sums = args.sums[index];
        const int64_t label = logits.labels[index] - args.first;
        const bool has_label = label >= 0 && label < logits.columns;
        if (has_label) sums.label = Rows::capped(logits, to_float(row[label]));
        float most = Rows::kNone;
        for (int64_t n = 0; n < logits.columns; n += kChunk) {
            Rows::load(logits, row, n, chunks[n / kChunk]);
            const float maximum = Rows::maximum_of(chunks[n / kChunk]);
            if (!(maximum <= most) && most == most) most = maximum;  // NaN stays
        }
        const float before = sums.maximum;
        sums.rescaled = 1;
        if (!(most <= before)) {
            typename Rows::Sums raised{before, sums.exponentials, sums.products, 0};
            raised.raise_to(most);
            sums.maximum = most;
            sums.exponentials = raised.exponentials;
            sums.products = raised.products;
            if (before != Rows::kNone) sums.rescaled = float(std::exp(double(before) - most));
        }
        for (int64_t n = 0; n < logits.columns; n += kChunk) {
            Chunk& chunk = chunks[n / kChunk];
            const int64_t count = std::min(kChunk, logits.columns - n);
            if (sums.maximum != Rows::kNone)
                add(logits, chunk, sums);
            else
                std::fill(chunk.value, chunk.value + count, 0.0f);
            if (logits.gradient) chunk.store(row + n, count);
        }
        if (has_label && logits.gradient) row[label] = from_float<T>(0.0f);
    }

    static void rows(const ClassBlockArgs& args, int64_t first, int64_t last) {
        Chunk chunks[kMost];
        for (; first < last; ++first) add_row(args, first, chunks);
    }
};

}  // namespace cross_entropy
}  // namespace peftcore
