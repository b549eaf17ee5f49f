// Clusters: blocks that take turns at their common barriers, and the dynamic shared memory of one as others see it.
//
// A block runs until all its threads wait for the cluster; then it is put aside, with its threads and its shared memory.
// Static arrays are copied out and in, for there is one for all blocks; dynamic memory stays where it is.
#pragma once

#include <cstring>

#include "emulator_collectives.h"

namespace emulator {

inline void cluster_barrier() {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.state = State::kCluster;
    fiber.place = "the cluster's barrier";
    ++machine.at_cluster;
    to_machine();
}

// `own` as it lies in block `number` of the cluster.
template <typename T>
const T* dynamic_shared_of(unsigned number, const T* own) {
    const char* base = machine.dynamic_shared.data();
    const char* address = reinterpret_cast<const char*>(own);
    if (address < base || address + sizeof(T) > base + machine.dynamic_shared.size())
        fail("another block's shared memory: not of what the launch asked for");
    if (number >= machine.cluster_size) fail("another block's shared memory: the cluster has no such block");
    if (number == machine.in_cluster) return own;
    const Block& block = machine.cluster[number];
    if (block.alive == 0)
        fail(std::string("another block's shared memory: that block has ") +
             (block.count > 0 ? "ended" : "not begun"));
    return reinterpret_cast<const T*>(machine.cluster[number].dynamic_shared.data() + (address - base));
}

}  // namespace emulator
