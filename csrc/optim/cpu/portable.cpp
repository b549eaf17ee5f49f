// Plain C++ for any CPU; it is also the readable version of the SIMD levels.
#include "optim/cpu/loops.h"

namespace peftcore {
namespace optim {
namespace {

struct Portable : Scalar {
    static const float* signed_table() { return signed_map().value; }
    static const float* unsigned_table() { return unsigned_map().value; }

    static inline float where_zero(float x, float d) { return d == 0 ? x : 0.0f; }
    struct Largest {
        uint32_t bits = 0;
        void take(float x) {
            const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
            bits = magnitude > bits ? magnitude : bits;
        }
        float value() const { return bits_float(bits); }
    };

    static constexpr int kChunk = 1;
    static void decode(const uint8_t* codes, const float* table, float absmax, float* out) {
        *out = table[*codes] * absmax;
    }

    template <bool kSigned>
    static void encode(const float* x, float inverse, const Encoder& encoder, uint8_t* codes) {
        for (int i = 0; i < kBlock; ++i)
            codes[i] =
                kSigned ? encode_signed(x[i] * inverse, encoder) : encode_unsigned(x[i] * inverse, encoder);
    }

    static float widen_half(const uint16_t* x) { return to_float(Half{*x}); }
    static float widen_bfloat16(const uint16_t* x) { return to_float(BFloat16{*x}); }
    static void narrow_half(float x, uint16_t* out) { *out = from_float<Half>(x).bits; }
    static void narrow_bfloat16(float x, uint16_t* out) { *out = from_float<BFloat16>(x).bits; }
};

}  // namespace

void fill_portable(Kernels& kernels) { kernels = kernels_of<Portable>(); }

}  // namespace optim
}  // namespace peftcore
