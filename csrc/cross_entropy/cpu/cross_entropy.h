// Cross-entropy of rows of logits, and its gradient in their place: two passes over a row, which fits in a cache.
// Chunks are fp32. Loops over a chunk take sixteen values at a time (sixteen.h), and sums have sixteen lanes, so that all
// levels give the same bits. Sums over a row are double. Formulas: peftcore/ops/cross_entropy.py.
#pragma once

#include <cmath>
#include <limits>

#include "cross_entropy/cpu/kernels.h"
#include "simd/chunk.h"
#include "simd/exponential.h"

namespace peftcore {
namespace cross_entropy {

using namespace simd;

// tanh(x), with a relative error of at most 4e-7: E / (E + 2) with E = e^2x - 1, whose polynomial has no constant term.
template <typename F>
PEFTCORE_INLINED F hyperbolic_tangent(const F& x) {
    constexpr uint32_t kMost = 0x41200000u;  // 10
    constexpr float kRound = 12582912.0f;    // as in `exponential_within`
    const F twice = 2.0f * limited(x, kMost);
    const F shifted = twice * 1.44269504f + kRound, n = shifted - kRound;
    const F r = (twice - n * 0.693359375f) + n * 2.12194440e-4f;
    F sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    const F power = bits_float((float_bits(shifted) - (float_bits(kRound) - 127u)) << 23u);
    const F e = sum * r * power + (power - 1.0f);
    // NaN stays.
    return bits_float(float_bits(e / (e + 2.0f)) | where_above(float_bits(x) & ~kSignBit, 0x7f800000u));
}

template <typename Level>
struct CrossEntropy {
    using T = typename Level::T;
    using Chunk = simd::Chunk<Level>;
    static_assert(kChunk % kSixteen == 0);
    static constexpr float kNone = -std::numeric_limits<float>::infinity();

    // Running maximum, Σ e^(z - maximum) and Σ e^(z - maximum) (z - maximum).
    struct Sums {
        float maximum = kNone;
        double exponentials = 0, products = 0, weighted = 0;

        void raise_to(float value) {
            if (maximum != kNone) {
                const double step = double(maximum) - value, factor = std::exp(step);
                products = factor * (products + exponentials * step);
                exponentials *= factor;
            }
            maximum = value;
        }
    };

    static inline float capped(const CrossEntropyArgs& args, float x) {
        return args.cap == 0 ? x * args.scale : args.cap * hyperbolic_tangent(x * (args.scale / args.cap));
    }

    static void load(const CrossEntropyArgs& args, const T* row, int64_t n, Chunk& chunk) {
        const int64_t count = std::min(kChunk, args.columns - n);
        chunk.load(row + n, count);
        if (args.cap == 0) {
            const float scale = args.scale;
            for (int64_t i = 0; scale != 1.0f && i < kChunk; ++i) chunk.value[i] *= scale;
        } else {
            const float cap = args.cap, scale = args.scale / args.cap;
            for (int64_t i = 0; i < kChunk; i += kSixteen) {
                Sixteen& z = sixteen_at(chunk.value + i);
                z = cap * hyperbolic_tangent(z * scale);
            }
        }
        for (int64_t i = count; i < kChunk; ++i) chunk.value[i] = kNone;
    }

    // NaN if a value is.
    static float maximum_of(const Chunk& chunk) {
        Sixteen most = sixteen_at(chunk.value);
        SixteenBits nan{};
        for (int64_t i = 0; i < kChunk; i += kSixteen) {
            const Sixteen z = sixteen_at(chunk.value + i);
            most = z > most ? z : most;
            nan |= where_nan(z);
        }
        float result = most[0];
        uint32_t any = nan[0];
        for (int64_t j = 1; j < kSixteen; ++j) {
            result = most[j] > result ? most[j] : result;
            any |= nan[j];
        }
        return any != 0 ? std::numeric_limits<float>::quiet_NaN() : result;
    }

    static void add(const Chunk& chunk, Sums& sums) {
        const float maximum = sums.maximum;
        Sixteen exponentials{}, products{};
        for (int64_t i = 0; i < kChunk; i += kSixteen) {
            const Below below(sixteen_at(chunk.value + i) - maximum);
            exponentials += below.exponential;
            products += below.exponential * below.value;
        }
        for (int64_t j = 0; j < kSixteen; ++j) {
            sums.exponentials += exponentials[j];
            sums.products += products[j];
        }
    }

    static void add_weighted(const CrossEntropyArgs& args, int64_t n, const Chunk& chunk, Sums& sums) {
        const int64_t count = std::min(kChunk, args.columns - n);
        for (int64_t i = 0; i < count; ++i)
            sums.weighted += double(chunk.value[i]) * (args.weights == nullptr ? 1.0f : args.weights[n + i]);
    }

    static Sums sums_of(const CrossEntropyArgs& args, const T* row, Chunk& chunk) {
        Sums sums;
        for (int64_t n = 0; n < args.columns; n += kChunk) {
            load(args, row, n, chunk);
            const float maximum = maximum_of(chunk);
            if (!(maximum <= sums.maximum)) sums.raise_to(maximum);
            if (sums.maximum != kNone) add(chunk, sums);
            if (args.smoothing != 0) add_weighted(args, n, chunk, sums);
        }
        return sums;
    }

    struct Factors {
        double softmax, label, uniform;  // of p / Σ e^(z - maximum), of the label, and of the class weights
    };

    static void gradient(const CrossEntropyArgs& args, T* row, float maximum, Factors factors, Chunk& chunk) {
        const float softmax = float(factors.softmax * args.scale), cap = args.cap,
                    inverse = cap == 0 ? 0.0f : 1.0f / cap;
        const float uniform = float(factors.uniform * args.scale);
        for (int64_t n = 0; n < args.columns; n += kChunk) {
            load(args, row, n, chunk);
            const int64_t count = std::min(kChunk, args.columns - n);
            float slope[kChunk];
            if (cap != 0)
                for (int64_t i = 0; i < kChunk; ++i)
                    slope[i] = 1.0f - (chunk.value[i] * inverse) * (chunk.value[i] * inverse);
            for (int64_t i = 0; i < kChunk; i += kSixteen) {
                Sixteen& z = sixteen_at(chunk.value + i);
                z = softmax * Below(z - maximum).exponential;
            }
            if (uniform != 0)
                for (int64_t i = 0; i < count; ++i)
                    chunk.value[i] -= args.weights == nullptr ? uniform : uniform * args.weights[n + i];
            if (cap != 0)
                for (int64_t i = 0; i < kChunk; ++i) chunk.value[i] *= slope[i];
            chunk.store(row + n, count);
        }
    }

    static void compute_row(const CrossEntropyArgs& args, int64_t index, Chunk& chunk) {
        T* row = static_cast<T*>(args.x) + index * args.columns;
        const int64_t label = args.labels[index];
        if (label == args.ignore_index) {
            args.loss[index] = args.lse[index] = args.entropy[index] = 0;
            if (args.gradient) std::memset(row, 0, size_t(args.columns) * sizeof(T));
            return;
        }
        const bool valid = label >= 0 && label < args.columns;
        const int64_t target = valid ? label : 0;
        const double invalid = valid ? 0.0 : std::numeric_limits<double>::quiet_NaN();
        const Sums sums = sums_of(args, row, chunk);
        const double of_label =
            (1.0 - args.smoothing) * (args.weights == nullptr ? 1.0 : double(args.weights[target]));
        const double uniform = args.smoothing / double(args.columns);
        const double log = std::log(sums.exponentials), lse = sums.maximum + log;
        const float z = capped(args, to_float(row[target]));
        double loss = of_label * ((double(sums.maximum) - z) + log) + args.z_loss * lse * lse + invalid;
        if (args.smoothing != 0) loss += uniform * (args.total_weight * lse - sums.weighted);
        args.loss[index] = float(loss);
        args.lse[index] = float(lse);
        args.entropy[index] = float(log - sums.products / sums.exponentials + (lse - lse));
        if (!args.gradient) return;
        // NaN, where a logit is not finite and no mask.
        const double of_softmax =
            (of_label + uniform * args.total_weight + 2 * args.z_loss * lse) / sums.exponentials +
            (lse - lse);
        const double factor = args.grad_scale == nullptr ? 1.0 : double(*args.grad_scale);
        gradient(args, row, sums.maximum, {of_softmax * factor, of_label * factor, uniform * factor}, chunk);
        const double tangent = args.cap == 0 ? 0.0 : double(z) / args.cap;
        const double at_label = std::exp(double(z) - sums.maximum) * of_softmax - of_label + invalid -
                                uniform * (args.weights == nullptr ? 1.0 : double(args.weights[target]));
        row[target] = from_float<T>(float(at_label * factor * args.scale * (1.0 - tangent * tangent)));
    }

    static void rows(const CrossEntropyArgs& args, int64_t first, int64_t last) {
        Chunk chunk;
        for (; first < last; ++first) compute_row(args, first, chunk);
    }
};

}  // namespace cross_entropy
}  // namespace peftcore
