// Loops over blocks shared by all SIMD levels; a level supplies the operations within a block.
#pragma once

#include <concepts>

#include "common/caches.h"
#include "quant4/cpu/kernels.h"

namespace peftcore {
namespace quant4 {

// Operations on `count` values of type T, a multiple of 32.
template <typename Level, typename T>
concept BlocksOf =
    requires(const T* x, T* y, int64_t count, float factor, uint8_t* codes, const uint8_t* packed,
             const typename Level::Encoder& encoder, const typename Level::Decoder& decoder) {
        { Level::absmax_bits(x, count) } -> std::same_as<uint32_t>;  // the largest magnitude_bits
        Level::encode(x, count, factor, encoder, codes);             // of x[i] factor
        Level::decode(packed, count, factor, decoder, y, true);  // times factor; true: bypassing the cache
    };

template <typename Level>
concept Blocks =
    BlocksOf<Level, float> && BlocksOf<Level, Half> && BlocksOf<Level, BFloat16> &&
    std::constructible_from<typename Level::Encoder, const Codebook&> &&
    std::constructible_from<typename Level::Decoder, const float*> && requires { Level::fence(); };

// NaN-propagating max of |x| on bit patterns: as integers, magnitudes order like floats with NaN above
// infinity.
template <typename T>
static inline uint32_t magnitude_bits(T x) {
    return float_bits(to_float(x)) & 0x7fffffffu;
}

template <typename T>
static void quantize_partial_block(const T* x, int64_t count, const Codebook& book, uint8_t* out,
                                   float* absmax) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = magnitude_bits(x[i]);
        largest = bits > largest ? bits : largest;
    }
    float scale = bits_float(largest);
    if (scale < kSmallestScale) scale = kSmallestScale;
    *absmax = scale;
    for (int64_t i = 0; i < count; i += 2) {
        const uint8_t high = encode(to_float(x[i]) / scale, book);
        const uint8_t low = encode(i + 1 < count ? to_float(x[i + 1]) / scale : 0.0f, book);
        out[i / 2] = uint8_t(high << 4 | low);
    }
}

// Blocks are processed in groups that stay in the L1 cache, with one pass for scales, one for reciprocals and one for
// codes: within a single block, each step would wait for the previous one.
constexpr int kGroupValues = 2048;
static_assert(kGroupValues * sizeof(float) <= kSmallestFirst / 2);

template <Blocks Level, typename Format, typename T>
static void quantize_blocks(const QuantizeCall& args, int64_t first, int64_t last) {
    const T* x = static_cast<const T*>(args.x);
    auto* absmax = static_cast<typename Format::Scale*>(args.absmax);
    const int64_t size = args.blocksize;
    const typename Level::Encoder encoder(args.book);
    const int64_t whole = args.count / size;  // blocks, of which none is partial
    const int64_t end = last < whole ? last : whole;
    const int64_t group = size < kGroupValues ? kGroupValues / size : 1;
    for (int64_t start = first; start < end; start += group) {
        const int64_t stop = start + group < end ? start + group : end;
        float inverse[kGroupValues / kMinBlocksize];
        for (int64_t block = start; block < stop; ++block)
            absmax[block] = Format::scale(Level::absmax_bits(x + block * size, size));
        for (int64_t i = 0; i < stop - start; ++i) inverse[i] = Format::inverse(absmax[start + i]);
        for (int64_t block = start; block < stop; ++block)
            Level::encode(x + block * size, size, inverse[block - start], encoder,
                          args.codes + block * size / 2);
    }
    if constexpr (Format::kHasPartialBlocks)
        if (last > whole) {
            const int64_t begin = whole * size;
            quantize_partial_block(x + begin, args.count - begin, args.book, args.codes + begin / 2,
                                   absmax + whole);
        }
}

constexpr int kGroupBlocks = 64;  // whose scales are read together

// Blocks of 16 values: entries are looked up together, and multiplied block by block.
template <Blocks Level, typename T>
static void dequantize_small_blocks(const DequantizeCall& args, int64_t first, int64_t last) {
    constexpr int64_t kSize = 16;
    const WeightView& weight = args.weight;
    T* out = static_cast<T*>(args.out);
    const typename Level::Decoder decoder(weight.quant_map);
    alignas(64) float scales[kGroupBlocks], entries[kGroupBlocks * kSize];
    for (int64_t start = first; start < last; start += kGroupBlocks) {
        const int64_t count = start + kGroupBlocks < last ? kGroupBlocks : last - start;
        block_scales(weight, start, start + count, scales);
        const uint8_t* codes = weight.codes + start * kSize / 2;
        Level::decode(codes, count / 2 * 32, 1.0f, decoder, entries, false);
        for (int64_t i = count / 2 * 32; i < count * kSize; i += 2) {
            entries[i] = weight.quant_map[codes[i / 2] >> 4];
            entries[i + 1] = weight.quant_map[codes[i / 2] & 15];
        }
        T* to = out + start * kSize;
        for (int64_t block = 0; block < count; ++block)
            for (int64_t i = block * kSize; i < (block + 1) * kSize; ++i)
                to[i] = from_float<T>(entries[i] * scales[block]);
    }
}

template <Blocks Level, typename T>
static void dequantize_blocks(const DequantizeCall& args, int64_t first, int64_t last) {
    const WeightView& weight = args.weight;
    if (weight.shift == 4) return dequantize_small_blocks<Level, T>(args, first, last);
    T* out = static_cast<T*>(args.out);
    const uint8_t* codes = weight.codes;
    const bool stream = args.stream;
    const int64_t all = weight.numel(), size = int64_t(1) << weight.shift;
    const typename Level::Decoder decoder(weight.quant_map);
    float scales[kGroupBlocks];
    for (int64_t start = first; start < last; start += kGroupBlocks) {
        const int64_t stop = start + kGroupBlocks < last ? start + kGroupBlocks : last;
        block_scales(weight, start, stop, scales);
        for (int64_t block = start; block < stop; ++block) {
            const int64_t begin = block * size;
            const float scale = scales[block - start];
            const int64_t count = begin + size > all ? all - begin : size;
            if (weight.zeros != nullptr) {  // of a format whose rows are whole blocks
                float entries[16];
                block_entries(weight, block, entries);
                Level::decode(codes + begin / 2, count, scale, typename Level::Decoder(entries), out + begin,
                              stream);
                continue;
            }
            const int64_t whole = count / 32 * 32;
            if (whole > 0) Level::decode(codes + begin / 2, whole, scale, decoder, out + begin, stream);
            for (int64_t i = whole; i < count; ++i) {
                const uint8_t byte = codes[(begin + i) / 2];
                out[begin + i] = from_float<T>(weight.quant_map[i % 2 ? byte & 15 : byte >> 4] * scale);
            }
        }
    }
    if (stream) Level::fence();
}

template <Blocks Level, typename Format>
static void quantize(const QuantizeCall& args, int64_t first, int64_t last) {
    switch (args.dtype) {
        case Dtype::kFloat:
            return quantize_blocks<Level, Format, float>(args, first, last);
        case Dtype::kHalf:
            return quantize_blocks<Level, Format, Half>(args, first, last);
        case Dtype::kBFloat16:
            return quantize_blocks<Level, Format, BFloat16>(args, first, last);
    }
}

template <Blocks Level>
static void dequantize(const DequantizeCall& args, int64_t first, int64_t last) {
    switch (args.dtype) {
        case Dtype::kFloat:
            return dequantize_blocks<Level, float>(args, first, last);
        case Dtype::kHalf:
            return dequantize_blocks<Level, Half>(args, first, last);
        case Dtype::kBFloat16:
            return dequantize_blocks<Level, BFloat16>(args, first, last);
    }
}

template <Blocks Level>
static Kernels kernels_of() {
    return {.quantize = quantize<Level, AbsmaxFormat>,
            .quantize_powers = quantize<Level, PowerOfTwoFormat>,
            .dequantize = dequantize<Level>};
}

}  // namespace quant4
}  // namespace peftcore
