// Launches: shared memory, the order of blocks and of a block's threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "emulator_fibers.h"

namespace emulator {

// A PEFTCORE_SHARED array: one static for all blocks, since one block runs at a time.
struct SharedArray {
    SharedArray(void* address, size_t bytes) {
        machine.arrays.emplace_back(address, bytes);
        memset(address, 0xff, bytes);  // the first block is running already
    }
};

inline void poison_shared() {
    for (auto [address, bytes] : machine.arrays) memset(address, 0xff, bytes);
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
    const size_t count = machine.ready.size(), start = machine.draw() % count;
    if (machine.warp_order.empty()) return start;
    const int* ready = machine.ready.data();
    const uint64_t* orders = machine.warp_order.data();
    size_t pick = start;
    uint64_t lowest = orders[ready[start] / kWarp];
    const auto look_at = [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            const uint64_t order = orders[ready[i] / kWarp];
            if (order < lowest) lowest = order, pick = i;
        }
    };
    look_at(start + 1, count);
    look_at(0, start);
    return pick;
}

inline void start_block(dim3 index, dim3 threads, size_t shared_bytes) {
    machine.index = index;
    machine.count = machine.alive = int(threads.x * threads.y * threads.z);
    if (int(machine.fibers.size()) < machine.count) machine.fibers.resize(machine.count);
    machine.ready.clear();
    machine.at_barrier = machine.at_cluster = 0;
    machine.barrier = nullptr;
    machine.meetings.assign((machine.count + kWarp - 1) / kWarp, {});
    machine.warp_order.clear();
    if (machine.draw() % 2)
        for (size_t i = 0; i < machine.meetings.size(); ++i) machine.warp_order.push_back(machine.draw());
    machine.dynamic_shared.resize(shared_bytes);
    machine.dynamic_shared.shrink_to_fit();
    poison_shared();
    for (int i = 0; i < machine.count; ++i) {
        Fiber& fiber = machine.fibers[i];
        prepare(fiber);
        fiber.index = dim3(i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y));
        make_ready(i);
    }
}

// To its end, or to where all of it waits for its cluster.
inline void run_block() {
    blockIdx = machine.index;
    while (machine.alive > 0 && machine.error.empty()) {
        if (machine.ready.empty()) {
            if (machine.at_cluster == machine.count) return;
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

// Puts the block that runs aside, or takes up one that was.
inline void exchange_with(Block& block) {
    std::vector<std::vector<char>> arrays;
    for (auto [address, bytes] : machine.arrays) {
        const char* from = static_cast<const char*>(address);
        arrays.emplace_back(from, from + bytes);
    }
    std::swap(static_cast<Block&>(machine), block);
    block.shared = std::move(arrays);
    for (size_t i = 0; i < machine.arrays.size(); ++i) {
        auto [address, bytes] = machine.arrays[i];
        if (i < machine.shared.size())
            memcpy(address, machine.shared[i].data(), bytes);
        else
            memset(address, 0xff, bytes);
    }
}

// All blocks of a cluster, from barrier to barrier.
inline void run_cluster(const std::vector<dim3>& indices, dim3 threads, size_t shared_bytes) {
    for (Block& block : machine.cluster) block.count = block.alive = 0;
    for (bool first = true, done = false; !done; first = false) {
        std::vector<unsigned> order(indices.size());
        for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.draw() % i]);
        size_t ended = 0;
        for (unsigned number : order) {
            exchange_with(machine.cluster[number]);
            machine.in_cluster = number;
            if (first) start_block(indices[number], threads, shared_bytes);
            run_block();
            ended += machine.alive == 0;
            exchange_with(machine.cluster[number]);
            if (!machine.error.empty()) return;
        }
        done = ended == indices.size();
        if (done) return;
        if (ended > 0) {
            machine.error = "a block of a cluster has ended where others wait for it";
            return;
        }
        for (unsigned number : order) {  // all are there
            Block& block = machine.cluster[number];
            block.at_cluster = 0;
            for (int i = 0; i < block.count; ++i) {
                block.fibers[i].state = State::kReady;
                block.ready.push_back(i);
            }
        }
    }
}

// `cluster`: blocks that lie next to each other and are one.
inline const char* launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel,
                          unsigned cluster = 1) {
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (blocks == 0 || threads == 0 || threads > 1024 || grid.x > 0x7fffffff || grid.y > 65535 ||
        grid.z > 65535 || cluster == 0 || cluster > 8 || grid.x % cluster != 0)
        return "invalid configuration argument";
    ++machine.launches;
    machine.random = machine.seed;
    machine.error.clear();
    machine.kernel = std::move(kernel);
    machine.cluster_size = cluster;
    if (machine.cluster.size() < cluster) machine.cluster.resize(cluster);
    gridDim = grid;
    blockDim = block;
    std::vector<uint64_t> order(blocks / cluster);
    for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
    for (uint64_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.draw() % i]);
    for (uint64_t first : order) {
        std::vector<dim3> indices;
        for (uint64_t i = first * cluster; i < (first + 1) * cluster; ++i)
            indices.emplace_back(unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                                 unsigned(i / grid.x / grid.y));
        if (cluster == 1) {
            start_block(indices[0], block, shared_bytes);
            run_block();
        } else {
            run_cluster(indices, block, shared_bytes);
        }
        if (!machine.error.empty()) return machine.error.c_str();
    }
    return nullptr;
}

}  // namespace emulator
