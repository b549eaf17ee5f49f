// The kernels on memory of exactly the size they may touch, for a run under sanitizers.
//
//   sanitized quant4 SEED   the 4-bit kernels over odd shapes, compared with the CPU's
//   sanitized linear SEED   linear_4bit's kernels likewise, compared with sums in double
//   sanitized lora SEED     LoRA's kernels likewise
//   sanitized grouped SEED   those of experts (sanitized_grouped.cpp)
//   sanitized optim SEED    the optimizer's, compared with the CPU's (sanitized_optim.cpp)
//   sanitized read LIMIT    a toy that reads beyond 100 values when LIMIT is more
//   sanitized shared INDEX  a toy that writes values[INDEX] of 32 in shared memory
#include "sanitized.h"

#include <cmath>
#include <random>

#include "emulator.h"
#include "levels.h"
#include "lora/cuda/lora_cuda.h"
#include "quant4/cpu/kernels.h"
#include "quant4/cuda/quant4_cuda.h"

extern "C" const char* toy_neighbour(const int*, int*, int, int, void*);
extern "C" const char* toy_shared(int*, int, void*);

namespace {

using namespace peftcore;
using namespace peftcore::quant4;

const float kCode[16] = {-1.0f, -0.7f, -0.52f, -0.39f, -0.28f, -0.18f, -0.09f, 0.0f,
                         0.08f, 0.16f, 0.25f,  0.34f,  0.44f,  0.56f,  0.72f,  1.0f};

// A weight of these parts, scales of 32 blocks sharing one where they are nested.
WeightView view(int64_t rows, int64_t columns, const Array<uint8_t>& codes, const Array<float>& absmax,
                const Array<float>& quant_map, int blocksize, bool nests, const Array<uint8_t>& quantized,
                const Array<float>& outer, const Array<float>& map, const Array<float>& offset) {
    WeightView weight;
    weight.rows = rows;
    weight.columns = columns;
    weight.codes = codes.data;
    weight.absmax = nests ? static_cast<const void*>(quantized.data) : absmax.data;
    weight.quant_map = quant_map.data;
    weight.shift = log2_of(blocksize);
    if (nests) {
        weight.scales = ScaleKind::kNested;
        weight.nested_absmax = outer.data;
        weight.nested_quant_map = map.data;
        weight.nested_offset = offset.data;
        weight.nested_shift = 5;
    }
    return weight;
}

template <typename T>
void compare(int64_t count, int blocksize, int skip, Dtype dtype, const Kernels& cpu, std::mt19937& random) {
    const int64_t blocks = (count + blocksize - 1) / blocksize, bytes = (count + 1) / 2;
    Array<T> x(count, skip), y(count, skip), y_cpu(count, skip);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) x.data[i] = from_float<T>(normal(random));
    Array<uint8_t> packed(bytes, skip), packed_cpu(bytes, skip);
    Array<float> absmax(blocks), absmax_cpu(blocks), code(16);
    std::copy_n(kCode, 16, code.data);
    const char* error = peftcore_quant4_quantize(x.data, int(dtype), code.data, count, blocksize, packed.data,
                                                 absmax.data, nullptr);
    require(error == nullptr, error ? error : "", count, blocksize);
    cpu.quantize({x.data, dtype, count, blocksize, make_codebook(kCode), packed_cpu.data, absmax_cpu.data}, 0,
                 blocks);
    require(packed == packed_cpu, "codes differ", count, blocksize);
    require(absmax == absmax_cpu, "scales differ", count, blocksize);

    const int64_t outer = (blocks + 31) / 32;
    Array<float> map(256), offset(1), nested(outer);
    Array<uint8_t> quantized(blocks);
    for (int i = 0; i < 256; ++i) map.data[i] = (i - 127) / 128.0f;
    offset.data[0] = 1.5f;
    error = peftcore_quant4_quantize_absmax(absmax.data, map.data, offset.data, blocks, 32, quantized.data,
                                            nested.data, nullptr);
    require(error == nullptr, error ? error : "", count, blocksize);
    for (bool nests : {false, true}) {
        const WeightView weight =
            view(1, count, packed, absmax, code, blocksize, nests, quantized, nested, map, offset);
        error = peftcore_quant4_dequantize(&weight, y.data, int(dtype), nullptr);
        require(error == nullptr, error ? error : "", count, blocksize);
        cpu.dequantize({weight, dtype, y_cpu.data, false}, 0, blocks);
        require(y == y_cpu, "values differ", count, blocksize);
    }
}

// Each expert's values are those of the whole weight.
void compare_experts(int64_t experts, int64_t rows, int64_t columns, bool nests, const Kernels& cpu,
                     std::mt19937& random) {
    const int blocksize = 32;
    const int64_t count = experts * rows * columns, blocks = count / blocksize;
    Array<uint8_t> codes(count / 2), quantized(blocks);
    Array<float> absmax(blocks), code(16), map(256), offset(1), outer((blocks + 31) / 32);
    Array<float> whole(count), one(rows * columns);
    std::copy_n(kCode, 16, code.data);
    for (int64_t i = 0; i < codes.count; ++i) codes.data[i] = uint8_t(random());
    for (int64_t i = 0; i < blocks; ++i) quantized.data[i] = uint8_t(random()), absmax.data[i] = float(i + 1);
    for (int64_t i = 0; i < outer.count; ++i) outer.data[i] = 1 + float(i);
    for (int i = 0; i < 256; ++i) map.data[i] = (i - 127) / 128.0f;
    offset.data[0] = 1.5f;
    const WeightView all =
        view(experts * rows, columns, codes, absmax, code, blocksize, nests, quantized, outer, map, offset);
    cpu.dequantize({all, Dtype::kFloat, whole.data, false}, 0, all.blocks());
    for (int64_t i = 0; i < experts; ++i) {
        const WeightView expert = expert_of(all, i, experts);
        cpu.dequantize({expert, Dtype::kFloat, one.data, false}, 0, expert.blocks());
        require(std::equal(one.data, one.data + one.count, whole.data + i * one.count), "an expert differs",
                count, blocksize);
    }
}

int run_quant4(uint64_t seed) {
    emulator::machine.seed = seed;
    std::mt19937 random(static_cast<unsigned>(seed));
    for (const auto& [level, cpu] : kernels_of_levels<Kernels>()) {
        int cases = 0;
        for (bool nests : {false, true}) compare_experts(7, 3, 96, nests, cpu, random);
        for (int blocksize : {32, 64, 512, 4096})
            for (int64_t count : {1, 31, 64, 1023, 1024, 2050, 8209})
                for (int skip : {0, 1}) {
                    compare<float>(count, blocksize, skip, Dtype::kFloat, cpu, random);
                    compare<Half>(count, blocksize, skip, Dtype::kHalf, cpu, random);
                    compare<BFloat16>(count, blocksize, skip, Dtype::kBFloat16, cpu, random);
                    cases += 3;
                }
        printf("%s: %d cases agree\n", level, cases);
    }
    return 0;
}

// linear_4bit's kernels compared with a sum in double. Tolerance: fp32 sums and one rounding to T. `mixed`: affine codes
// have scales in fp16 instead of fp32, and zero points in fp32 instead of bytes.
template <typename T>
void compare_linear(int64_t rows, int64_t columns, int batch, int blocksize, ScaleKind scales, bool mixed,
                    Dtype dtype, std::mt19937& random) {
    const bool nested = scales == ScaleKind::kNested;
    const int64_t count = rows * columns, blocks = (count + blocksize - 1) / blocksize;
    Array<uint8_t> packed(count / 2), quantized(blocks);
    Array<float> absmax(blocks), code(16), map(256), offset(1), outer((blocks + 31) / 32);
    Array<T> x(batch * columns), bias(rows), y(batch * rows);
    std::normal_distribution<float> normal;
    std::copy_n(kCode, 16, code.data);
    for (int64_t i = 0; i < packed.count; ++i) packed.data[i] = uint8_t(random());
    for (int64_t i = 0; i < blocks; ++i) quantized.data[i] = uint8_t(random());
    for (int64_t i = 0; i < outer.count; ++i) outer.data[i] = 1 + float(i);
    for (int i = 0; i < 256; ++i) map.data[i] = (i - 127) / 128.0f;
    offset.data[0] = 1.5f;
    for (int64_t i = 0; i < blocks; ++i)
        absmax.data[i] = map.data[quantized.data[i]] * outer.data[i / 32] + offset.data[0];
    for (int64_t i = 0; i < x.count; ++i) x.data[i] = from_float<T>(normal(random));
    for (int64_t i = 0; i < rows; ++i) bias.data[i] = from_float<T>(normal(random));
    WeightView weight =
        view(rows, columns, packed, absmax, code, blocksize, nested, quantized, outer, map, offset);
    Array<Half> halves(blocks);
    Array<uint8_t> points(blocks);
    Array<float> fractions(blocks);
    if (scales == ScaleKind::kPowerOfTwo || scales == ScaleKind::kAffine) weight.scales = scales;
    if (scales == ScaleKind::kPowerOfTwo) {
        for (int64_t i = 0; i < blocks; ++i) quantized.data[i] = uint8_t(120 + random() % 10);
        weight.absmax = quantized.data;
    }
    if (scales == ScaleKind::kAffine) {
        for (int64_t i = 0; i < blocks; ++i) {
            halves.data[i] = from_float<Half>(absmax.data[i]);
            points.data[i] = uint8_t(random() % 16);
            fractions.data[i] = points.data[i] + 0.25f;
        }
        weight.scale_dtype = mixed ? Dtype::kHalf : Dtype::kFloat;
        weight.absmax = mixed ? static_cast<const void*>(halves.data) : absmax.data;
        weight.zeros = mixed ? static_cast<const void*>(fractions.data) : points.data;
        weight.whole_zeros = !mixed;
    }
    require(peftcore_quant4_linear_takes(x.data, int(dtype), batch, &weight), "not taken", count, blocksize);
    Array<float> partial(peftcore_quant4_linear_workspace(batch, &weight));
    const char* error = peftcore_quant4_linear(x.data, int(dtype), batch, &weight, bias.data, nullptr,
                                               nullptr, 0, partial.data, y.data, nullptr);
    require(error == nullptr, error ? error : "", count, blocksize);
    for (int m = 0; m < batch; ++m)
        for (int64_t n = 0; n < rows; ++n) {
            double sum = to_float(bias.data[n]), magnitude = std::fabs(sum);
            for (int64_t k = 0; k < columns; ++k) {
                const int64_t i = n * columns + k;
                const int q = i % 2 ? packed.data[i / 2] & 15 : packed.data[i / 2] >> 4;
                const int64_t block = i / blocksize;
                const float entry = kCode[q] - (weight.zeros == nullptr ? 0 : block_zero(weight, block));
                const double w = to_float(from_float<T>(entry * block_scale(weight, block)));
                const double product = w * to_float(x.data[m * columns + k]);
                sum += product;
                magnitude += std::fabs(product);
            }
            const double found = to_float(y.data[m * rows + n]);
            const double eps = dtype == Dtype::kBFloat16 ? 0x1p-8 : dtype == Dtype::kHalf ? 0x1p-11 : 0x1p-24;
            require(std::fabs(found - sum) <= magnitude * 0x1p-18 + std::fabs(sum) * eps, "linear differs",
                    count, blocksize);
        }
    // With LoRA in the same launch, whose B is zero: the same, where there is a kernel for it.
    const int rank = 5;
    Array<T> a(rank * columns), b(rows * rank), same(batch * rows);
    Array<float> s(batch * rank);
    for (int64_t i = 0; i < a.count; ++i) a.data[i] = from_float<T>(normal(random));
    std::fill_n(b.data, b.count, T{});
    const lora::OneLaunch given = {x.data, dtype, batch, bias.data, a.data, b.data,
                                   dtype,  dtype, rank,  1.0f,      s.data, same.data};
    bool launched = false;
    const char* other = peftcore_lora_one_launch(&given, &weight, &launched, nullptr);
    require(other == nullptr, other ? other : "", count, blocksize);
    require(!launched || same == y, "one launch differs", count, blocksize);
}

int run_linear(uint64_t seed) {
    emulator::machine.seed = seed;
    std::mt19937 random(static_cast<unsigned>(seed));
    int cases = 0;
    for (int64_t rows : {1, 17, 33})
        for (int64_t columns : {64, 320, 576})
            for (int batch : {1, 8, 24})
                for (bool mixed : {false, true}) {
                    const std::pair<ScaleKind, int> kinds[] = {
                        {mixed ? ScaleKind::kNested : ScaleKind::kFloat, 64},
                        {ScaleKind::kNested, 16},
                        {ScaleKind::kPowerOfTwo, mixed ? 64 : 32},
                        {ScaleKind::kAffine, mixed ? 64 : 32}};
                    for (const auto& [scales, size] : kinds) {
                        compare_linear<Half>(rows, columns, batch, size, scales, mixed, Dtype::kHalf, random);
                        compare_linear<BFloat16>(rows, columns, batch, size, scales, mixed, Dtype::kBFloat16,
                                                 random);
                    }
                    cases += 2;
                }
    printf("%d cases agree\n", cases);
    return 0;
}

// LoRA's kernels compared with sums in double: left [rows, inner], right [inner, columns], both by (i, j).
template <typename T, typename Left, typename Right>
void compare_product(const Array<T>& found, int64_t rows, int64_t inner, int64_t columns, const Left& left,
                     const Right& right, const char* what) {
    const double eps = std::is_same_v<T, BFloat16> ? 0x1p-8 : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-24;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; ++n) {
            double sum = 0, magnitude = 0;
            for (int64_t k = 0; k < inner; ++k) {
                const double product = double(left(m, k)) * right(k, n);
                sum += product;
                magnitude += std::fabs(product);
            }
            const double error = std::fabs(to_float(found.data[m * columns + n]) - sum);
            const double tolerance = magnitude * 0x1p-18 + std::fabs(sum) * eps + 0x1p-24;
            require(error <= tolerance, what, rows * columns, int(inner));
        }
}

// T: of x. F: of dA and dB.
template <typename T, typename F>
void compare_lora(int64_t rows, int64_t columns, int rank, int skip, Dtype dtype, Dtype gradient_dtype,
                  std::mt19937& random) {
    std::normal_distribution<float> normal;
    const auto fill = [&](auto& array) {
        for (int64_t i = 0; i < array.count; ++i)
            array.data[i] = from_float<std::remove_reference_t<decltype(array.data[0])>>(normal(random));
    };
    Array<T> x(rows * columns, skip), bias(columns, skip), out(rows * columns, skip);
    Array<float> a(rank * columns, skip), b(columns * rank, skip), bt(rank * columns, skip);
    Array<float> s(rows * rank, skip), thin(rows * rank, skip), product(rows * rank, skip);
    Array<F> da(rank * columns, skip), db(columns * rank, skip);
    fill(x), fill(bias), fill(thin), fill(a), fill(b), fill(bt);
    Array<float> partial(std::max(peftcore_lora_down_workspace(rows, columns, rank),
                                  peftcore_lora_reduce_workspace(rows, columns, rank)));
    Array<float> products(peftcore_lora_product_workspace(rows, columns, rank));
    const float *left = a.data, *right = b.data;
    const float scale = 1;
    const auto checked = [&](const char* error) {
        require(error == nullptr, error ? error : "", rows, rank);
    };
    const auto of = [](const auto& array, int64_t width) {
        return [&array, width](int64_t i, int64_t j) { return to_float(array.data[i * width + j]); };
    };
    const auto transposed = [](const auto& array, int64_t width) {
        return [&array, width](int64_t i, int64_t j) { return to_float(array.data[j * width + i]); };
    };
    using lora::Factors, lora::Wide;
    const Wide wide{x.data, dtype, 1, rows, columns}, written{out.data, dtype, 1, rows, columns};
    const Factors lefts{&left, &rank, &scale, 1, rank, nullptr},
        rights{&right, &rank, nullptr, 1, rank, nullptr};
    const Dropout none, some{6554, 1, 2};
    checked(peftcore_lora_down(&wide, &lefts, &none, partial.data, s.data, nullptr));
    compare_product(s, rows, columns, rank, of(x, columns), transposed(a, columns), "down differs");
    checked(peftcore_lora_up(thin.data, &rights, &none, nullptr, false, &written, nullptr));
    compare_product(out, rows, rank, columns, of(thin, rank), transposed(b, rank), "up differs");
    checked(peftcore_lora_reduce(&wide, thin.data, rank, &none, partial.data, da.data, int(gradient_dtype),
                                 true, nullptr));
    compare_product(da, rank, rows, columns, transposed(thin, rank), of(x, columns), "reduce differs");
    if (rank > lora::kOnePassMaxRank) return;
    checked(peftcore_lora_reduce_and_product(&wide, thin.data, bt.data, rank, scale, partial.data,
                                             products.data, db.data, int(gradient_dtype), product.data,
                                             nullptr));
    compare_product(db, columns, rows, rank, transposed(x, columns), of(thin, rank), "reduce differs");
    compare_product(product, rows, columns, rank, of(x, columns), transposed(bt, columns), "product differs");
    // Dropout, for what it touches.
    checked(peftcore_lora_down(&wide, &lefts, &some, partial.data, s.data, nullptr));
    checked(peftcore_lora_up(thin.data, &rights, &some, bias.data, false, &written, nullptr));
    checked(peftcore_lora_drop(&wide, &some, out.data, nullptr));
}

int run_lora(uint64_t seed) {
    emulator::machine.seed = seed;
    std::mt19937 random(static_cast<unsigned>(seed));
    int cases = 0;
    for (int64_t rows : {1, 33, 70})
        for (int64_t columns : {8, 75, 136})
            for (int rank : {1, 16, 72})
                for (int skip : {0, 1}) {
                    compare_lora<Half, Half>(rows, columns, rank, skip, Dtype::kHalf, Dtype::kHalf, random);
                    compare_lora<BFloat16, float>(rows, columns, rank, skip, Dtype::kBFloat16, Dtype::kFloat,
                                                  random);
                    cases += 2;
                }
    printf("%d cases agree\n", cases);
    return 0;
}

int report(const char* error) {
    puts(error ? error : "nothing found");
    return error != nullptr;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string what = argc > 2 ? argv[1] : "";
    const int number = argc > 2 ? atoi(argv[2]) : 0;
    if (what == "quant4") return run_quant4(uint64_t(number));
    if (what == "linear") return run_linear(uint64_t(number));
    if (what == "lora") return run_lora(uint64_t(number));
    if (what == "grouped") return run_grouped(uint64_t(number));
    if (what == "optim") return run_optim(uint64_t(number));
    if (what == "read") {
        Array<int> in(100), out(100);
        std::fill_n(in.data, 100, 1);
        return report(toy_neighbour(in.data, out.data, 100, number, nullptr));
    }
    if (what == "shared") {
        Array<int> out(32);
        return report(toy_shared(out.data, number, nullptr));
    }
    fprintf(stderr, "usage: sanitized quant4|linear|lora|grouped|optim SEED | read LIMIT | shared INDEX\n");
    return 2;
}
