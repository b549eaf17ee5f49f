// The optimizer's kernels on memory of exactly the size they may touch: CUDA's on the emulator compared with each
// SIMD level's.
#include <algorithm>
#include <random>
#include <vector>

#include "emulator.h"
#include "levels.h"
#include "optim/cpu/kernels.h"
#include "optim/cuda/optim_cuda.h"
#include "sanitized.h"

namespace {

using namespace peftcore;
using namespace peftcore::optim;

// What a rule's kernels read, as rule_table.cpp has it, in bytes a block of 256.
struct RuleUnderTest {
    int number;
    const char* name;
    std::vector<int> planes;
    Scalars scalars;
};

template <typename... Rule>
std::vector<RuleUnderTest> rules_under_test(RuleList<Rule...>) {
    std::vector<RuleUnderTest> rules;
    const auto add = [&](const char* name, int moments, bool in_8_bits) {
        RuleUnderTest rule = {
            int(rules.size()), name, {}, {{1, 0.999f, 0.1f, 0.999f, 0.001f, -0.01f, 1, 1e-8f}}};
        rule.planes.assign(moments, in_8_bits ? kBlock : 4 * kBlock);
        if (in_8_bits) rule.planes.insert(rule.planes.end(), moments, 4);
        rules.push_back(rule);
    };
    (add(Rule::kName, Rule::kMoments, Rule::kIn8Bits), ...);
    return rules;
}

// A parameter of T, its gradient, and fresh state in planes.
template <typename T>
struct Tensor {
    Tensor(const RuleUnderTest& rule, int64_t count, int skip, Dtype dtype, int64_t stream)
        : param(count, skip), grad(count, skip), blocks((count + kBlock - 1) / kBlock) {
        segment = {param.data, grad.data, {}, count, 0, stream, 1, 0, dtype, dtype};
        for (size_t i = 0; i < rule.planes.size(); ++i) {
            const int bytes = rule.planes[i];
            state.emplace_back(bytes < kBlock ? blocks * bytes : count * (bytes / kBlock));
            memset(state[i].data, bytes == kBlock && i == 0 ? 127 : 0, state[i].count);  // codes of zero
            segment.state[i] = state[i].data;
        }
    }
    Array<T> param, grad;
    int64_t blocks;
    std::vector<Array<char>> state;
    Segment segment;
};

template <typename T>
void step_on_cpu(const Kernels& cpu, const RuleUnderTest& rule, Tensor<T>& tensor) {
    const Segment& s = tensor.segment;
    Array<float> p(s.count), g(s.count);
    for (int64_t i = 0; i < s.count; ++i) g.data[i] = to_float(tensor.grad.data[i]);
    if (s.param_dtype == Dtype::kFloat)
        memcpy(p.data, s.param, s.count * sizeof(float));
    else
        cpu.widen(s.param, s.param_dtype, s.count, p.data);
    cpu.update[rule.number](p.data, g.data, s.state, s.count, rule.scalars);
    if (s.param_dtype == Dtype::kFloat)
        memcpy(s.param, p.data, s.count * sizeof(float));
    else if (s.stream < 0)
        cpu.narrow(p.data, s.count, s.param_dtype, s.param);
    else
        cpu.narrow_stochastic(p.data, s.count, s.param_dtype, s.param, s.stream, s.step, 0);
}

// Tensors of several sizes in one launch, two steps.
template <typename T>
void compare(const Kernels& cpu, const RuleUnderTest& rule, Dtype dtype, int skip, int64_t stream,
             std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<Tensor<T>> device, host;
    Array<int64_t> first_block(6);
    first_block.data[0] = 0;
    for (int64_t count : {1, 255, 256, 700, 1031}) {
        for (auto* tensors : {&device, &host}) tensors->emplace_back(rule, count, skip, dtype, stream);
        const size_t i = device.size();
        first_block.data[i] = first_block.data[i - 1] + device.back().blocks;
        for (int64_t k = 0; k < count; ++k)
            device.back().param.data[k] = host.back().param.data[k] = from_float<T>(normal(random));
    }
    Array<Scalars> row(1);
    Array<Maps> maps(1);
    *maps.data = {signed_map(), unsigned_map()};
    *row.data = rule.scalars;
    for (int step = 0; step < 2; ++step) {
        Array<Segment> segments(device.size());
        for (size_t i = 0; i < device.size(); ++i) {
            for (int64_t k = 0; k < device[i].grad.count; ++k)
                device[i].grad.data[k] = host[i].grad.data[k] = from_float<T>(normal(random));
            segments.data[i] = device[i].segment;
            step_on_cpu(cpu, rule, host[i]);
        }
        const char* error =
            peftcore_optim_step(rule.number, segments.data, first_block.data, int(device.size()),
                                first_block.data[device.size()], row.data, maps.data, nullptr);
        require(error == nullptr, error ? error : "", int64_t(device.size()), kBlock);
    }
    for (size_t i = 0; i < device.size(); ++i) {
        require(device[i].param == host[i].param, rule.name, device[i].param.count, kBlock);
        for (size_t k = 0; k < device[i].state.size(); ++k)
            require(device[i].state[k] == host[i].state[k], rule.name, device[i].param.count, kBlock);
    }
}

}  // namespace

int run_optim(uint64_t seed) {
    emulator::machine.seed = seed;
    std::mt19937 random(static_cast<unsigned>(seed));
    for (const auto& [level, cpu] : kernels_of_levels<Kernels>()) {
        int cases = 0;
        for (const RuleUnderTest& rule : rules_under_test(Rules()))
            for (int skip : {0, 1})
                for (int64_t stream : {-1, 7}) {
                    compare<float>(cpu, rule, Dtype::kFloat, skip, stream, random);
                    compare<Half>(cpu, rule, Dtype::kHalf, skip, stream, random);
                    compare<BFloat16>(cpu, rule, Dtype::kBFloat16, skip, stream, random);
                    cases += 3;
                }
        printf("%s: %d cases agree\n", level, cases);
    }
    return 0;
}
