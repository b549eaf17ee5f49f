// Launches: shared memory, the order of blocks and of a block's threads.
#pragma once

#include <algorithm>
#include <cstring>

#include "emulator_fibers.h"

namespace emulator {

// A PEFTCORE_SHARED array: one static for all blocks, since one block runs at a time.
struct SharedArray {
    SharedArray(void* address, size_t bytes) {
        machine.shared.emplace_back(address, bytes);
        memset(address, 0xff, bytes);  // the first block is running already
    }
};

inline void poison_shared() {
    for (auto [address, bytes] : machine.shared) memset(address, 0xff, bytes);
    std::fill(machine.dynamic_shared.begin(), machine.dynamic_shared.end(), char(0xff));
}

inline std::string describe_deadlock() {
    std::string text = "deadlock in block " + std::to_string(blockIdx.x) + ":";
    int shown = 0;
    for (int i = 0; i < machine.count && shown < 4; ++i) {
        const Fiber& fiber = machine.fibers[i];
        const bool first = i == 0 || fiber.state != machine.fibers[i - 1].state ||
                           fiber.place != machine.fibers[i - 1].place;
        if (!first) continue;
        text += std::string(shown++ ? "; " : " ") + "thread " + std::to_string(i) + " ";
        text += fiber.state == State::kDone ? "has ended" : std::string("waits at ") + fiber.place;
    }
    return text;
}

// Half of the blocks draw any thread that can run. In the other half one warp runs as far as it can before
// the next does, in drawn order: so a warp is far ahead of another that it should have waited for.
inline size_t pick_thread() {
    size_t pick = machine.draw() % machine.ready.size();
    if (machine.warp_order.empty()) return pick;
    const size_t start = pick;
    for (size_t i = 0; i < machine.ready.size(); ++i) {
        const size_t other = (start + i) % machine.ready.size();
        const uint64_t order = machine.warp_order[machine.ready[other] / kWarp];
        if (order < machine.warp_order[machine.ready[pick] / kWarp]) pick = other;
    }
    return pick;
}

inline void run_block(dim3 block) {
    machine.count = machine.alive = int(block.x * block.y * block.z);
    if (int(machine.fibers.size()) < machine.count) machine.fibers.resize(machine.count);
    machine.ready.clear();
    machine.at_barrier = 0;
    machine.barrier = nullptr;
    machine.meetings.assign((machine.count + kWarp - 1) / kWarp, {});
    machine.warp_order.clear();
    if (machine.draw() % 2)
        for (size_t i = 0; i < machine.meetings.size(); ++i) machine.warp_order.push_back(machine.draw());
    poison_shared();
    for (int i = 0; i < machine.count; ++i) {
        Fiber& fiber = machine.fibers[i];
        prepare(fiber);
        fiber.index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
        make_ready(i);
    }
    while (machine.alive > 0 && machine.error.empty()) {
        if (machine.ready.empty()) {
            machine.error = describe_deadlock();
            return;
        }
        const size_t pick = pick_thread();
        const int thread = machine.ready[pick];
        machine.ready[pick] = machine.ready.back();
        machine.ready.pop_back();
        resume(thread);
    }
}

inline const char* launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (blocks == 0 || threads == 0 || threads > 1024 || grid.x > 0x7fffffff || grid.y > 65535 ||
        grid.z > 65535)
        return "invalid configuration argument";
    ++machine.launches;
    machine.random = machine.seed;
    machine.error.clear();
    machine.kernel = std::move(kernel);
    machine.dynamic_shared.assign(shared_bytes, 0);
    machine.dynamic_shared.shrink_to_fit();
    gridDim = grid;
    blockDim = block;
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[machine.draw() % i]);
    for (uint64_t i : order) {
        blockIdx = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
        run_block(block);
        if (!machine.error.empty()) return machine.error.c_str();
    }
    return nullptr;
}

}  // namespace emulator
