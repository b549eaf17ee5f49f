// The kernels of experts on memory of exactly the size they may touch, compared with sums in double; and with offsets that
// lead out of it.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "emulator.h"
#include "grouped/cuda/grouped_cuda.h"
#include "sanitized.h"

namespace {

using namespace peftcore;
using namespace peftcore::grouped;

// An expert's values are whole blocks of 64, of which 64 share a scale of scales.
struct Sizes {
    int64_t inner, columns;
    int rank;
    bool affine;
};

template <typename T>
class Case {
 public:
    Case(const Sizes& sizes, const std::vector<int>& ends, int64_t rows, int skip, Dtype dtype,
         std::mt19937& random)
        : sizes_(sizes),
          experts_(int64_t(ends.size())),
          rows_(rows),
          count_(sizes.inner * sizes.columns),
          dtype_(dtype),
          random_(random),
          offsets_(experts_),
          x_(rows * sizes.inner),
          out_(rows * sizes.columns, skip),
          base_(rows * sizes.columns),
          bias_(experts_ * sizes.columns, skip),
          thin_(rows * sizes.rank, skip),
          factor_(experts_ * sizes.columns * sizes.rank, skip),
          codes_(experts_ * count_ / 2),
          absmax_(experts_ * count_ / 64),
          quant_map_(16),
          map_(256),
          offset_(1),
          outer_((experts_ * count_ / 64 + 63) / 64),
          halves_(experts_ * count_ / 64) {
        std::copy(ends.begin(), ends.end(), offsets_.data);
        for (Array<T>* array : {&x_, &base_, &bias_}) fill(*array);
        for (Array<float>* array : {&thin_, &factor_, &quant_map_, &map_, &offset_, &outer_}) fill(*array);
        for (int64_t i = 0; i < codes_.count; ++i) codes_.data[i] = uint8_t(random());
        for (int64_t i = 0; i < absmax_.count; ++i) {
            absmax_.data[i] = uint8_t(random());
            halves_.data[i] = from_float<Half>(1.0f / 16 + absmax_.data[i] / 256.0f);
        }
    }

    void run(bool rise) {
        const Groups groups = {offsets_.data, experts_, rows_};
        const Skinny skinny = {groups, dtype_,     x_.data,    out_.data,    sizes_.inner, sizes_.columns,
                               view(), bias_.data, thin_.data, factor_.data, sizes_.rank};
        if (peftcore_grouped_is_skinny(&skinny)) {
            checked(peftcore_grouped_skinny(&skinny, nullptr));
            compare(rise, [&](int64_t expert, int64_t m, int64_t n, const auto& add) {
                for (int64_t k = 0; k < sizes_.inner; ++k)
                    add(to_float(x_.data[m * sizes_.inner + k]) * value(expert, k, n));
            });
        }
        Up up = {groups,      dtype_, sizes_.columns, bias_.data, thin_.data, factor_.data,
                 sizes_.rank, {},     out_.data};
        std::copy_n(base_.data, base_.count, out_.data);
        checked(peftcore_grouped_up(&up, nullptr));
        compare(rise, [&](int64_t, int64_t m, int64_t n, const auto& add) {
            add(to_float(base_.data[m * sizes_.columns + n]));
        });
        up.dropout = {6554, 1, 2};  // for what it touches
        checked(peftcore_grouped_up(&up, nullptr));

        const bool across = sizes_.rank > 16;
        const Array<float> a(experts_ * sizes_.inner * sizes_.rank), s(rows_ * sizes_.rank);
        std::fill_n(a.data, a.count, 1.0f);
        Down down = {groups, dtype_, x_.data, sizes_.inner, a.data, across, sizes_.rank, 1, {}, s.data};
        checked(peftcore_grouped_down(&down, nullptr));
        down.dropout = up.dropout;
        checked(peftcore_grouped_down(&down, nullptr));

        const Array<T> da(experts_ * sizes_.inner * sizes_.rank);
        const Reduce reduce = {groups,      dtype_, x_.data, thin_.data, sizes_.inner,
                               sizes_.rank, {},     dtype_,  across,     da.data};
        checked(peftcore_grouped_reduce(&reduce, nullptr));
        for (int64_t i = 0; i < da.count; ++i)
            require(std::isfinite(to_float(da.data[i])) == rise, "a gradient differs", rows_, sizes_.rank);
    }

 private:
    template <typename Element>
    void fill(Array<Element>& array) {
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < array.count; ++i) array.data[i] = from_float<Element>(normal(random_));
    }

    void checked(const char* error) { require(error == nullptr, error ? error : "", rows_, sizes_.rank); }

    WeightView view() const {
        WeightView weight;
        weight.rows = experts_ * sizes_.columns;
        weight.columns = sizes_.inner;
        weight.codes = codes_.data;
        weight.absmax = absmax_.data;
        weight.quant_map = quant_map_.data;
        weight.shift = 6;
        if (sizes_.affine) {  // whose zero points are the bytes that scales are otherwise
            weight.scales = ScaleKind::kAffine;
            weight.scale_dtype = Dtype::kHalf;
            weight.absmax = halves_.data;
            weight.zeros = absmax_.data;
            return weight;
        }
        weight.scales = ScaleKind::kNested;
        weight.nested_absmax = outer_.data;
        weight.nested_quant_map = map_.data;
        weight.nested_offset = offset_.data;
        weight.nested_shift = 6;
        return weight;
    }

    double value(int64_t expert, int64_t k, int64_t n) const {
        const int64_t i = expert * count_ + n * sizes_.inner + k;
        const int q = i % 2 ? codes_.data[i / 2] & 15 : codes_.data[i / 2] >> 4;
        const float zero = sizes_.affine ? block_zero(view(), i / 64) : 0;
        return to_float(from_float<T>((quant_map_.data[q] - zero) * block_scale(view(), i / 64)));
    }

    // `add_base(expert, row, column, add)`: adds the terms of the frozen product.
    template <typename AddBase>
    void compare(bool rise, const AddBase& add_base) const {
        const double eps = sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
        int64_t expert = 0;
        for (int64_t m = 0; m < rows_; ++m) {
            while (rise && expert < experts_ && m >= offsets_.data[expert]) ++expert;
            for (int64_t n = 0; n < sizes_.columns; ++n) {
                const double found = to_float(out_.data[m * sizes_.columns + n]);
                if (!rise || expert == experts_) {
                    require(rise ? found == 0 : std::isnan(found), "a row of none differs", rows_,
                            sizes_.rank);
                    continue;
                }
                double sum = to_float(bias_.data[expert * sizes_.columns + n]), magnitude = std::fabs(sum);
                const auto add = [&](double term) { sum += term, magnitude += std::fabs(term); };
                add_base(expert, m, n, add);
                const float* f = factor_.data + (expert * sizes_.columns + n) * sizes_.rank;
                for (int j = 0; j < sizes_.rank; ++j) add(double(thin_.data[m * sizes_.rank + j]) * f[j]);
                const double tolerance = magnitude * 0x1p-18 + std::fabs(sum) * eps + 0x1p-24;
                require(std::fabs(found - sum) <= tolerance, "a product differs", rows_, sizes_.rank);
            }
        }
    }

    Sizes sizes_;
    int64_t experts_, rows_, count_;
    Dtype dtype_;
    std::mt19937& random_;
    Array<int32_t> offsets_;
    Array<T> x_, out_, base_, bias_;
    Array<float> thin_, factor_;
    Array<uint8_t> codes_, absmax_;
    Array<float> quant_map_, map_, offset_, outer_;
    Array<Half> halves_;
};

}  // namespace

int run_grouped(uint64_t seed) {
    emulator::machine.seed = seed;
    std::mt19937 random(static_cast<unsigned>(seed));
    struct {
        std::vector<int> ends;
        int64_t rows;
        bool rise;
    } const groups[] = {{{3, 3, 20}, 22, true},   {{40, 71}, 71, true},   {{130}, 131, true},
                        {{2, 1, 9}, 9, false},    {{-7, 5, 9}, 9, false}, {{4, 9, 1 << 30}, 9, false},
                        {{9, 1 << 30}, 70, false}};
    int cases = 0;
    for (const auto& [ends, rows, rise] : groups)
        for (bool affine : {false, true})
            for (int rank : {1, 16, 33}) {
                const Sizes sizes = {cases % 2 ? 64 : 192, cases / 2 % 2 ? 75 : 96, rank, affine};
                const int skip = cases / 3 % 2;
                if (cases % 3 == 0) Case<float>(sizes, ends, rows, skip, Dtype::kFloat, random).run(rise);
                if (cases % 3 == 1) Case<Half>(sizes, ends, rows, skip, Dtype::kHalf, random).run(rise);
                if (cases % 3 == 2)
                    Case<BFloat16>(sizes, ends, rows, skip, Dtype::kBFloat16, random).run(rise);
                ++cases;
            }
    printf("%d cases agree\n", cases);
    return 0;
}
