// NEON: a vector is two registers, as the loops read dropout bits of eight columns at once.
#include "common/neon.h"

#include "simd/loops.h"

namespace peftcore {
namespace simd {
namespace {

struct Neon {
    static constexpr int kLanes = 8, kRows = 6;  // of 32 registers, 24 hold sums
    using Vector = EightFloats;

    static inline Vector set(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
    static inline Vector zero() { return set(0); }
    static inline Vector add(Vector a, Vector b) {
        return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
    }
    static inline Vector mul(Vector a, Vector b) {
        return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
    }
    static inline Vector fma(Vector a, Vector b, Vector c) {
        return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
    }

    template <typename T>
    static inline Vector load(const T* from) {
        return load_eight(from);
    }
    static inline void store(float* to, Vector v) {
        vst1q_f32(to, v.low);
        vst1q_f32(to + 4, v.high);
    }
    template <typename T>
    static inline void store(T* to, Vector v) {
        vst1q_u16(bits_of(to), vcombine_u16(rounded(v.low, to), rounded(v.high, to)));
    }

    static inline Vector keep(Vector v, uint32_t bits) {
        const uint32x4_t all = vdupq_n_u32(bits), first = {1, 2, 4, 8}, second = {16, 32, 64, 128};
        const auto masked = [&](float32x4_t values, uint32x4_t bit) {
            return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(values), vtstq_u32(all, bit)));
        };
        return {masked(v.low, first), masked(v.high, second)};
    }

    // The products of four words with one, as words below and above.
    struct Products {
        uint32x4_t low, high;
    };
    static inline Products multiply(uint32x4_t words, uint32_t by) {
        const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(words), by));
        const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_n_u32(words, by));
        return {vuzp1q_u32(first, second), vuzp2q_u32(first, second)};
    }

    // Four counters a vector.
    static inline void keep_bytes(const Dropout& dropout, int64_t row, int64_t first, int64_t count,
                                  uint8_t* out) {
        const uint16x8_t threshold = vdupq_n_u16(uint16_t(dropout.threshold));
        const uint32x4_t places = {0, 1, 2, 3};
        for (int64_t at = 0; at < filled_up(count, kCounters); at += 4) {
            uint32x4_t a = vaddq_u32(vdupq_n_u32(uint32_t(first + at)), places),
                       b = vdupq_n_u32(uint32_t(row)), c = vdupq_n_u32(uint32_t(uint64_t(row) >> 32)),
                       d = vdupq_n_u32(0);
            uint32_t key0 = dropout.key0, key1 = dropout.key1;
            for (int round = 0; round < kPhiloxRounds; ++round) {
                const Products p = multiply(a, kPhiloxMultiply0), q = multiply(c, kPhiloxMultiply1);
                a = veorq_u32(veorq_u32(q.high, b), vdupq_n_u32(key0));
                c = veorq_u32(veorq_u32(p.high, d), vdupq_n_u32(key1));
                b = q.low;
                d = p.low;
                key0 += kPhiloxWeyl0;
                key1 += kPhiloxWeyl1;
            }
            // The bits of the lower and the upper 16 of a word, in each counter's lane.
            const auto kept_bits = [&](uint32x4_t words, uint32_t bits) {
                const uint16x8_t above = vcgeq_u16(vreinterpretq_u16_u32(words), threshold);
                return vandq_u16(above, vreinterpretq_u16_u32(vdupq_n_u32(bits)));
            };
            const uint16x8_t bits = vorrq_u16(vorrq_u16(kept_bits(a, 0x00020001), kept_bits(b, 0x00080004)),
                                              vorrq_u16(kept_bits(c, 0x00200010), kept_bits(d, 0x00800040)));
            const uint16x4_t bytes = vmovn_u32(vpaddlq_u16(bits));
            const uint32_t four =
                vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(bytes, bytes))), 0);
            std::memcpy(out + at, &four, sizeof four);
        }
    }

    static inline Vector sums(const Vector* v) {
        const auto both = [&](int i) { return vaddq_f32(v[i].low, v[i].high); };
        const auto four = [&](int i) {
            return vpaddq_f32(vpaddq_f32(both(i), both(i + 1)), vpaddq_f32(both(i + 2), both(i + 3)));
        };
        return {four(0), four(4)};
    }
};

}  // namespace

void fill_neon(CpuKernels& table) { fill_loops<Neon>(table); }

}  // namespace simd
}  // namespace peftcore
