// NEON, which every 64-bit ARM processor has: bytes are looked up 16 at a time, and a value of 16 or 32 bits takes two
// or four of them.
#include "common/neon.h"

#include "quant4/cpu/blocks.h"

namespace peftcore {
namespace quant4 {
namespace {

struct Neon {
    // Comparisons are "not above", which is false for NaN, and give -1: the search is for 15 minus the rank.
    struct Encoder {
        explicit Encoder(const Codebook& book) {
            float tree[2][8] = {};
            for (int i = 0; i < 4; ++i) tree[0][i] = book.threshold[13 - 4 * i];
            for (int i = 0; i < 8; ++i) tree[1][i] = book.threshold[14 - 2 * i];
            uint8_t reversed[16];
            for (int i = 0; i < 16; ++i) reversed[i] = book.order[15 - i];
            const auto bytes = [](const float* from) { return vreinterpretq_u8_f32(vld1q_f32(from)); };
            step8 = vdupq_n_f32(book.threshold[7]);
            low4 = vdupq_n_f32(book.threshold[3]);
            high4 = vdupq_n_f32(book.threshold[11]);
            step2 = bytes(tree[0]);
            step1 = {{bytes(tree[1]), bytes(tree[1] + 4)}};
            order = vld1q_u8(reversed);
        }
        float32x4_t step8, low4, high4;
        uint8x16_t step2;
        uint8x16x2_t step1;
        uint8x16_t order;
    };

    struct Decoder {
        explicit Decoder(const float* code) {
            for (int i = 0; i < 4; ++i) of[i] = vld1q_f32(code + 4 * i);
        }
        inline float32x4_t scaled(int i, float scale) const { return vmulq_n_f32(of[i], scale); }
        float32x4_t of[4];
    };

    static inline uint32_t absmax_bits(const float* x, int64_t count) {
        const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
        uint32x4_t a = vdupq_n_u32(0), b = a;
        for (int64_t i = 0; i < count; i += 8) {
            const EightFloats values = load_eight(x + i);
            a = vmaxq_u32(a, vandq_u32(vreinterpretq_u32_f32(values.low), magnitude));
            b = vmaxq_u32(b, vandq_u32(vreinterpretq_u32_f32(values.high), magnitude));
        }
        return vmaxvq_u32(vmaxq_u32(a, b));
    }

    // 16-bit magnitudes have the same order as their fp32 values.
    template <typename T>
    static inline uint32_t absmax_bits(const T* x, int64_t count) {
        const uint16x8_t magnitude = vdupq_n_u16(0x7fff);
        uint16x8_t a = vdupq_n_u16(0), b = a;
        for (int64_t i = 0; i < count; i += 16) {
            a = vmaxq_u16(a, vandq_u16(vld1q_u16(bits_of(x + i)), magnitude));
            b = vmaxq_u16(b, vandq_u16(vld1q_u16(bits_of(x + i + 8)), magnitude));
        }
        return magnitude_bits(T{vmaxvq_u16(vmaxq_u16(a, b))});
    }

    static inline int32x4_t not_above(float32x4_t value, float32x4_t threshold) {
        return vreinterpretq_s32_u32(vcleq_f32(value, threshold));
    }
    static inline int32x4_t next(int32x4_t index, int32x4_t bit) {
        return vaddq_s32(vaddq_s32(index, index), bit);
    }

    // The rank of each of 4 values minus 15.
    static inline int32x4_t lowered_rank(float32x4_t value, const Encoder& encoder) {
        int32x4_t index = not_above(value, encoder.step8);
        index = next(index,
                     not_above(value, vbslq_f32(vreinterpretq_u32_s32(index), encoder.low4, encoder.high4)));
        const uint8x16_t two = vqtbl1q_u8(encoder.step2, byte_index(index));
        index = next(index, not_above(value, vreinterpretq_f32_u8(two)));
        const uint8x16_t one = vqtbl2q_u8(encoder.step1, byte_index(index));
        return next(index, not_above(value, vreinterpretq_f32_u8(one)));
    }

    // The codes of 16 values times `inverse`.
    template <typename T>
    static inline uint8x16_t codes(const T* x, float inverse, const Encoder& encoder) {
        const EightFloats a = load_eight(x), b = load_eight(x + 8);
        const auto pair = [&](const EightFloats& eight) {
            return vuzp1q_s16(vreinterpretq_s16_s32(lowered_rank(vmulq_n_f32(eight.low, inverse), encoder)),
                              vreinterpretq_s16_s32(lowered_rank(vmulq_n_f32(eight.high, inverse), encoder)));
        };
        const int8x16_t lowered = vuzp1q_s8(vreinterpretq_s8_s16(pair(a)), vreinterpretq_s8_s16(pair(b)));
        return vqtbl1q_u8(encoder.order, vreinterpretq_u8_s8(vnegq_s8(lowered)));
    }

    template <typename T>
    static inline void encode(const T* x, int64_t count, float inverse, const Encoder& encoder,
                              uint8_t* out) {
        for (int64_t i = 0; i < count; i += 32) {
            const uint8x16_t a = codes(x + i, inverse, encoder), b = codes(x + i + 16, inverse, encoder);
            vst1q_u8(out + i / 2, vsliq_n_u8(vuzp2q_u8(a, b), vuzp1q_u8(a, b), 4));
        }
    }

    static inline void decode(const uint8_t* packed, int64_t count, float scale, const Decoder& decoder,
                              float* out, bool) {
        const FloatTable table(decoder.scaled(0, scale), decoder.scaled(1, scale), decoder.scaled(2, scale),
                               decoder.scaled(3, scale));
        for (int64_t i = 0; i < count; i += 32) {
            const uint8x16x2_t index = nibbles(vld1q_u8(packed + i / 2));
            for (int half = 0; half < 2; ++half) {
                const FloatTable::Values values = table(index.val[half]);
                for (int j = 0; j < 4; ++j) vst1q_f32(out + i + 16 * half + 4 * j, values.of[j]);
            }
        }
    }

    template <typename T>
    static inline void decode(const uint8_t* packed, int64_t count, float scale, const Decoder& decoder,
                              T* out, bool) {
        const auto pair = [&](int i) {
            return vcombine_u16(rounded(decoder.scaled(i, scale), out),
                                rounded(decoder.scaled(i + 1, scale), out));
        };
        const ShortTable table(pair(0), pair(2));
        for (int64_t i = 0; i < count; i += 32) {
            const uint8x16x2_t index = nibbles(vld1q_u8(packed + i / 2));
            for (int half = 0; half < 2; ++half) {
                const uint16x8x2_t values = table(index.val[half]);
                vst1q_u16(bits_of(out + i + 16 * half), values.val[0]);
                vst1q_u16(bits_of(out + i + 16 * half + 8), values.val[1]);
            }
        }
    }

    static void fence() {}
};

}  // namespace

void fill_neon(Kernels& kernels) { kernels = kernels_of<Neon>(); }

}  // namespace quant4
}  // namespace peftcore
