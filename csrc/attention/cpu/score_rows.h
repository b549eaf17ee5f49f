// Softmax of a row of attention scores, in place, and its gradient. Loops process a vector at a time (sixteen.h).
#pragma once

#include <cmath>
#include <limits>

#include "attention/cpu/kernels.h"
#include "common/integers.h"
#include "simd/exponential.h"
#include "simd/keep_bytes.h"

namespace peftcore {
namespace attention {

using namespace simd;

typedef uint8_t NativeBytes __attribute__((vector_size(kNative), may_alias));

// Keys that a query attends to: those before `end` whose mask byte is not 0. `mask` may be nullptr, or point to one byte
// for all keys (stride 0).
struct Visible {
    const uint8_t* mask;
    int64_t stride, end;

    [[gnu::always_inline]] Visible(const AttentionArgs& args, int64_t batch, int64_t head, int64_t query)
        : mask(args.mask), stride(args.mask_strides[3]), end(args.keys) {
        if (mask != nullptr)
            mask += batch * args.mask_strides[0] + head * args.mask_strides[1] + query * args.mask_strides[2];
        if (args.causal && query + 1 < end) end = query + 1;
    }
};

// Keys of a query that dropout keeps, as bits.
template <typename Level>
struct KeptKeys {
    uint16_t bits[kMostKeys / 16];

    KeptKeys(const AttentionArgs& args, int64_t row) {
        if (args.dropout.threshold != 0)
            Level::keep_bytes(args.dropout, row, 0, ceil_div(args.keys, kColumnsPerCounter),
                              reinterpret_cast<uint8_t*>(bits));
    }
};

template <typename Level>
struct ScoreRows {
    static constexpr float kInfinity = std::numeric_limits<float>::infinity();
    using KeptKeys = attention::KeptKeys<Level>;

    // Bit mask of a vector of keys, from `key` on: all ones for those that are visible, or kept.
    PEFTCORE_INLINED NativeBits bits_of(const Visible& visible, int64_t key) {
        const int64_t left = visible.end - key;
        NativeBits before_end = ~NativeBits{};
        if (left < kNative)
            for (int64_t j = 0; j < kNative; ++j) before_end[j] = j < left ? ~0u : 0u;
        if (visible.mask == nullptr) return before_end;
        if (visible.stride == 0) return visible.mask[0] != 0 ? before_end : NativeBits{};
        NativeBytes bytes{};
        if (left >= kNative)
            std::memcpy(&bytes, visible.mask + key, sizeof bytes);
        else if (left > 0)
            std::memcpy(&bytes, visible.mask + key, size_t(left));
        return where_above(__builtin_convertvector(bytes, NativeBits), 0u) & before_end;
    }
    PEFTCORE_INLINED NativeBits bits_of(const KeptKeys& kept_keys, int64_t key) {
        NativeBits lane_bits = NativeBits{} + (uint32_t(kept_keys.bits[key / 16]) >> key % 16);
        for (int64_t j = 0; j < kNative; ++j) lane_bits[j] = lane_bits[j] >> j & 1u;
        return 0u - lane_bits;
    }

    PEFTCORE_INLINED Native select(const NativeBits& mask_bits, const Native& value) {
        return bits_float(float_bits(value) & mask_bits);
    }

    static float sum_of(const Native& x) {
        float sum = 0;
        for (int64_t j = 0; j < kNative; ++j) sum += x[j];
        return sum;
    }

    // Replaces `count` scores s by e^(s - max s), and by 0 for keys that are hidden or dropped. Returns lse and 1 / the sum
    // over visible keys. If no key is visible, lse is infinity and the factor 0; if a score is not finite, both are NaN.
    struct Softmax {
        float lse, factor;
    };

    template <bool kDrops>
    static Softmax softmax(float* s, float scale, const Visible& visible, const KeptKeys& kept_keys,
                           int64_t count) {
        const Native unseen = Native{} - kInfinity;
        Native most = unseen;
        NativeBits nan{};
        for (int64_t n = 0; n < count; n += kNative) {
            Native& value = native_at(s + n);
            const NativeBits mask_bits = bits_of(visible, n);
            const Native z =
                bits_float((float_bits(value * scale) & mask_bits) | (float_bits(unseen) & ~mask_bits));
            nan |= where_nan(z);
            most = z > most ? z : most;
            value = z;
        }
        float largest = most[0];
        uint32_t any = nan[0];
        for (int j = 1; j < kNative; ++j) {
            largest = std::max(largest, most[j]);
            any |= nan[j];
        }
        Native sum{};
        for (int64_t n = 0; n < count; n += kNative) {
            Native& value = native_at(s + n);
            const Native e = Below(value - largest).exponential;
            sum += e;
            value = kDrops ? select(bits_of(kept_keys, n), e) : e;
        }
        constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
        if (any != 0 || largest == kInfinity) return {kNan, kNan};
        if (largest == -kInfinity) {
            std::memset(s, 0, size_t(count) * sizeof *s);
            return {kInfinity, 0.0f};
        }
        const float total = sum_of(sum);
        return {largest + std::log(total), 1.0f / total};
    }

    // Replaces the scores of a row by P (after dropout, as dv needs it), and dP by dS.
    template <bool kDrops>
    static void slopes_of(float* s, float* dp, const AttentionArgs& args, float lse, float delta,
                          const Visible& visible, const KeptKeys& kept_keys, int64_t count) {
        const bool no_key = lse == kInfinity;
        const float not_finite = no_key ? 0.0f : lse - lse;  // added: 0, or NaN
        const float shift = no_key ? 0.0f : lse;
        for (int64_t n = 0; n < count; n += kNative) {
            Native &score = native_at(s + n), &slope = native_at(dp + n);
            const NativeBits mask_bits = no_key ? NativeBits{} : bits_of(visible, n);
            const Native z = score * args.scale - shift;
            // z > 0 or NaN only if lse does not belong to these scores.
            const Native power = z > -87.0f ? exponential(z) : Native{};
            const Native e = select(mask_bits, bits_float(float_bits(power) | where_nan(z)) + not_finite);
            Native dp_term = slope, p = e;
            if constexpr (kDrops) {
                const NativeBits keeps = bits_of(kept_keys, n);
                dp_term = select(keeps, dp_term * args.kept_factor);
                p = select(keeps, e * args.kept_factor);
            }
            score = p;
            slope = select(mask_bits, e * (dp_term - delta) * args.scale);
        }
    }
};

}  // namespace attention
}  // namespace peftcore
