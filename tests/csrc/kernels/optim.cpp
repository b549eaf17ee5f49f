// Steps of optimizers: AdamW compared with double; all rules by their bits, which are the same at every level.
#include "checks.h"

namespace peftcore {
namespace {

void try_adamw(const optim::Kernels& kernels, int64_t count) {
    const optim::Scalars scalars = {{1, 0.99f, 0.1f, 0.999f, 0.001f, -0.01f, 0.5f, 1e-8f}};
    Values<float> p = numbers<float>(count), m = numbers<float>(count), v(count);
    const Values<float> g = numbers<float>(count), was = p, first = m;
    for (float& value : v) value = std::fabs(number());
    const Values<float> second = v;
    void* state[] = {m.data(), v.data()};
    kernels.update[0](p.data(), g.data(), state, count, scalars);
    for (int64_t i = 0; i < count; ++i) {
        const double moment = first[i] + 0.1f * (double(g[i]) - first[i]);
        const double square = double(second[i]) * 0.999f + 0.001f * double(g[i]) * g[i];
        const double step = -0.01f * moment / (std::sqrt(square) / 0.5f + 1e-8f);
        close(p[i], double(was[i]) * 0.99f + step, 4 * std::fabs(was[i]), "adamw", i);
        close(v[i], square, square, "second moment", i);
    }
    note(p), note(m), note(v);
    ++cases;
}

// Rules 1 to 3 of optim/rules.h, three steps. Some gradients are zero for whole blocks, or not finite.
void try_rule(const optim::Kernels& kernels, int rule, const optim::Scalars& scalars, int64_t count) {
    Values<float> p = numbers<float>(count), m = numbers<float>(count),
                  scales(2 * ceil_div(count, optim::kBlock), 1.5f);
    Values<uint8_t> codes(2 * count);
    for (uint8_t& code : codes) code = uint8_t(source() >> 8);
    void* in_floats[] = {m.data()};
    void* in_codes[] = {codes.data(), codes.data() + count, scales.data(),
                        scales.data() + scales.count() / 2};
    for (int step = 0; step < 3; ++step) {
        Values<float> g = numbers<float>(count);
        for (int64_t i = 0; i < count; ++i) {
            if (i / optim::kBlock % 3 == 1) g[i] = 0;
            if (i % 301 == 5) g[i] = i % 2 ? INFINITY : NAN;
            if (i % 7 == 0) g[i] *= 0x1p-20f;
        }
        kernels.update[rule](p.data(), g.data(), rule == 1 ? in_codes : in_floats, count, scalars);
    }
    note(p), note(m), note(codes), note(scales);
    ++cases;
}

void try_rounding(const optim::Kernels& kernels, int64_t count) {
    Values<float> x = numbers<float>(count);
    for (int64_t i = 0; i < count; ++i) {
        if (i % 9 == 1) x[i] *= 0x1p-20f;   // subnormal in fp16
        if (i % 9 == 2) x[i] *= 0x1p-130f;  // and in bf16
        if (i % 9 == 3) x[i] *= 0x1p16f;    // above fp16's largest
        if (i % 99 == 4) x[i] = i % 2 ? INFINITY : NAN;
    }
    for (Dtype dtype : {Dtype::kHalf, Dtype::kBFloat16}) {
        Values<uint16_t> narrow(count), random(count);
        Values<float> back(count);
        kernels.narrow(x.data(), count, dtype, narrow.data());
        kernels.widen(narrow.data(), dtype, count, back.data());
        kernels.narrow_stochastic(x.data(), count, dtype, random.data(), 7, 1, 0);
        for (int64_t i = 0; i < count; ++i) {
            const bool half = dtype == Dtype::kHalf;
            const uint16_t bits = half ? from_float<Half>(x[i]).bits : from_float<BFloat16>(x[i]).bits;
            const float value = half ? to_float(Half{narrow[i]}) : to_float(BFloat16{narrow[i]});
            require(narrow[i] == bits, "narrow", i);
            require(float_bits(back[i]) == float_bits(value), "widen", i);
        }
        note(narrow), note(random);
    }
    ++cases;
}

}  // namespace

void try_optim(const CpuKernels& kernels) {
    for (int64_t count : {1, 256, 1031}) {
        try_adamw(kernels.optim, count);
        try_rule(kernels.optim, 1, {{1, 0.99f, 0.1f, 0.999f, 0.001f, -0.01f, 1e-8f}}, count);  // adamw_8bit
        try_rule(kernels.optim, 2, {{1, 0.99f, 0.1f, 0.01f, -0.01f}}, count);                  // lion
        try_rule(kernels.optim, 3, {{1, 0.01f, 0.9f, 0.1f, -0.01f, 1}}, count);                // momentum
        try_rounding(kernels.optim, count);
    }
}

}  // namespace peftcore
