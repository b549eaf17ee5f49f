// rms_norm's and the gates' kernels on memory of exactly the size they may touch; their outputs are compared with double.
#include <cmath>
#include <random>
#include <type_traits>

#include "common/half.h"
#include "elementwise/cuda/gated_cuda.h"
#include "emulator.h"
#include "norms/cuda/rms_norm_cuda.h"
#include "sanitized.h"

namespace {

using namespace peftcore;
using namespace peftcore::elementwise;
using namespace peftcore::norms;

template <typename T>
constexpr Dtype kDtype = sizeof(T) == 4            ? Dtype::kFloat
                         : std::is_same_v<T, Half> ? Dtype::kHalf
                                                   : Dtype::kBFloat16;
// Two roundings of a result and its relative error in fp32.
template <typename T>
constexpr double kStep = sizeof(T) == 4            ? 0x1p-20
                         : std::is_same_v<T, Half> ? 0x1p-10
                                                   : 0x1p-7;

template <typename T>
void fill(const Array<T>& array, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < array.count; ++i) array.data[i] = from_float<T>(normal(random));
}

template <typename T>
void require_finite(const Array<T>& array, const char* what, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < array.count; ++i)
        require(std::isfinite(to_float(array.data[i])), what, rows, int(columns));
}

template <typename T, typename Weight>
void norm(int64_t rows, int64_t columns, int skip, std::mt19937& random) {
    const Array<T> x(rows * columns, skip), y(rows * columns, skip), dy(rows * columns, skip),
        dx(rows * columns, skip);
    const Array<Weight> weight(columns, skip);
    const Array<float> scale(rows), sums(peftcore_rms_norm_groups(rows) * columns);
    fill(x, random), fill(dy, random), fill(weight, random);
    RmsNormCall call = {};
    call.dtype = kDtype<T>;
    call.weight_dtype = kDtype<Weight>;
    call.rows = rows;
    call.columns = columns;
    call.x = x.data;
    call.weight = weight.data;
    call.eps = 1e-5f;
    call.rounded = skip == 0;
    call.y = y.data;
    call.scale = scale.data;
    call.dy = dy.data;
    call.dx = dx.data;
    call.sums = sums.data;
    for (auto launch : {peftcore_rms_norm, peftcore_rms_norm_dx, peftcore_rms_norm_dweight}) {
        const char* error = launch(&call, nullptr);
        require(error == nullptr, error ? error : "", rows, int(columns));
    }
    for (int64_t m = 0; m < rows; ++m) {
        double squares = 0;
        for (int64_t k = 0; k < columns; ++k)
            squares += std::pow(double(to_float(x.data[m * columns + k])), 2);
        const double r = 1 / std::sqrt(squares / double(columns) + 1e-5);
        for (int64_t k = 0; k < columns; ++k) {
            const double wanted = to_float(x.data[m * columns + k]) * r * to_float(weight.data[k]);
            const double off = std::fabs(to_float(y.data[m * columns + k]) - wanted);
            require(off <= 2 * kStep<T> * std::fabs(wanted) + 1e-6, "a norm differs", rows, int(columns));
        }
    }
    require_finite(dx, "a gradient of x differs", rows, columns);
    require_finite(sums, "a gradient of the weight differs", rows, columns);
}

// Gate and up apart, or in one matrix side by side.
template <typename T>
void gates(int64_t rows, int64_t columns, bool together, int skip, std::mt19937& random) {
    const int64_t count = rows * columns;
    const Array<T> gate(together ? 2 * count : count, skip), up(together ? 0 : count, skip),
        dgate(gate.count, skip), dup(up.count, skip), y(count, skip), dy(count, skip);
    fill(gate, random), fill(up, random), fill(dy, random);
    GatedCall call = {};
    call.dtype = kDtype<T>;
    call.gate = gate.data;
    call.up = together ? gate.data + columns : up.data;
    call.rows = together ? rows : 1;
    call.columns = together ? columns : count;
    call.stride = together ? 2 * columns : count;
    call.linear = 1;
    call.rounded = !together;
    call.y = y.data;
    call.dy = dy.data;
    call.dgate = dgate.data;
    call.dup = together ? dgate.data + columns : dup.data;
    for (auto launch : {peftcore_gated, peftcore_gated_backward}) {
        const char* error = launch(&call, nullptr);
        require(error == nullptr, error ? error : "", rows, int(columns));
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t place = i / call.columns * call.stride + i % call.columns;
        const double g = to_float(gate.data[place]), u = to_float(static_cast<const T*>(call.up)[place]);
        const double wanted = g / (1 + std::exp(-g)) * u;
        const double off = std::fabs(to_float(y.data[i]) - wanted);
        require(off <= 2 * kStep<T> * std::fabs(wanted) + 1e-6, "a gate differs", rows, int(columns));
    }
    require_finite(dgate, "a gradient of the gate differs", rows, columns);
    require_finite(dup, "a gradient of up differs", rows, columns);
}

template <typename T>
int run(std::mt19937& random) {
    int cases = 0;
    for (int64_t rows : {1, 7, 70})
        for (int64_t columns : {1, 75, 96, 264, 1032, rows == 1 ? 9001 : 40})
            for (int skip : {0, 1}) {
                norm<T, T>(rows, columns, skip, random);
                norm<T, float>(rows, columns, skip, random);
                for (bool together : {false, true}) gates<T>(rows, columns, together, skip, random);
                cases += 4;
            }
    return cases;
}

}  // namespace

int run_norms(uint64_t seed) {
    emulator::machine.seed = seed;
    std::mt19937 random(static_cast<unsigned>(seed));
    printf("%d cases agree\n", run<float>(random) + run<Half>(random) + run<BFloat16>(random));
    return 0;
}
