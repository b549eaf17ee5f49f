// The optimizer's kernels on memory of exactly the size they may touch: CUDA's on the emulator beside each
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

const char* kRules[] = {"AdamW differs", "AdamW 8-bit differs", "Lion differs", "momentum differs"};

// A parameter of T, its gradient, and fresh state in planes.
template <typename T>
struct Tensor {
    Tensor(Rule rule, int64_t count, int skip, Dtype dtype, int64_t stream)
        : param(count, skip), grad(count, skip), blocks((count + kBlock - 1) / kBlock) {
        segment = {param.data, grad.data, {}, count, 0, stream, 1, 0, dtype, dtype};
        const Planes planes = planes_of(rule);
        for (int i = 0; i < planes.count; ++i) {
            const int bytes = planes.bytes[i];
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
void step_on_cpu(const Kernels& cpu, Rule rule, Tensor<T>& tensor, const Scalars& row) {
    const Segment& s = tensor.segment;
    Array<float> p(s.count), g(s.count);
    for (int64_t i = 0; i < s.count; ++i) g.data[i] = to_float(tensor.grad.data[i]);
    if (s.param_dtype == Dtype::kFloat)
        memcpy(p.data, s.param, s.count * sizeof(float));
    else
        cpu.widen(s.param, s.param_dtype, s.count, p.data);
    float *first = static_cast<float*>(s.state[0]), *second = static_cast<float*>(s.state[1]);
    if (rule == Rule::kAdamW) cpu.adamw(p.data, g.data, first, second, s.count, row.adamw);
    if (rule == Rule::kLion) cpu.lion(p.data, g.data, first, s.count, row.lion);
    if (rule == Rule::kMomentum) cpu.momentum(p.data, g.data, first, s.count, row.momentum);
    if (rule == Rule::kAdamW8bit)
        for (int64_t i = 0; i < s.count; i += kBlock)
            cpu.adamw_8bit(p.data + i, g.data + i, static_cast<uint8_t*>(s.state[0]) + i,
                           static_cast<uint8_t*>(s.state[1]) + i,
                           static_cast<float*>(s.state[2]) + i / kBlock,
                           static_cast<float*>(s.state[3]) + i / kBlock,
                           std::min<int64_t>(kBlock, s.count - i), row.adamw);
    if (s.param_dtype == Dtype::kFloat)
        memcpy(s.param, p.data, s.count * sizeof(float));
    else if (s.stream < 0)
        cpu.narrow(p.data, s.count, s.param_dtype, s.param);
    else
        cpu.narrow_stochastic(p.data, s.count, s.param_dtype, s.param, s.stream, s.step, 0);
}

// Tensors of several sizes in one launch, two steps.
template <typename T>
void compare(const Kernels& cpu, Rule rule, Dtype dtype, int skip, int64_t stream, std::mt19937& random) {
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
    if (rule == Rule::kLion)
        row.data->lion = {1, 0.999f, 0.1f, 0.01f, -0.01f};
    else if (rule == Rule::kMomentum)
        row.data->momentum = {1, 0.1f, 0.9f, 0.9f, -0.01f, 1};
    else
        row.data->adamw = {1, 0.999f, 0.1f, 0.999f, 0.001f, -0.01f, 1, 1e-8f};
    for (int step = 0; step < 2; ++step) {
        Array<Segment> segments(device.size());
        for (size_t i = 0; i < device.size(); ++i) {
            for (int64_t k = 0; k < device[i].grad.count; ++k)
                device[i].grad.data[k] = host[i].grad.data[k] = from_float<T>(normal(random));
            segments.data[i] = device[i].segment;
            step_on_cpu(cpu, rule, host[i], *row.data);
        }
        const char* error =
            peftcore_optim_step(int(rule), segments.data, first_block.data, int(device.size()),
                                first_block.data[device.size()], row.data, maps.data, nullptr);
        require(error == nullptr, error ? error : "", int64_t(device.size()), kBlock);
    }
    for (size_t i = 0; i < device.size(); ++i) {
        require(device[i].param == host[i].param, kRules[int(rule)], device[i].param.count, kBlock);
        for (size_t k = 0; k < device[i].state.size(); ++k)
            require(device[i].state[k] == host[i].state[k], kRules[int(rule)], device[i].param.count, kBlock);
    }
}

}  // namespace

int run_optim(uint64_t seed) {
    emulator::machine.seed = seed;
    std::mt19937 random(static_cast<unsigned>(seed));
    for (const auto& [level, cpu] : kernels_of_levels<Kernels>()) {
        int cases = 0;
        for (Rule rule : {Rule::kAdamW, Rule::kAdamW8bit, Rule::kLion, Rule::kMomentum})
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
