// Barriers and warp collectives: where fibers wait for each other.
#pragma once

#include <algorithm>
#include <cstring>

#include "emulator_fibers.h"

namespace emulator {

inline void barrier(const char* place) {
    if (machine.barrier != nullptr && strcmp(machine.barrier, place) != 0)
        fail(std::string("threads of one block wait at different barriers: ") + machine.barrier + " and " +
             place);
    machine.barrier = place;
    Fiber& fiber = machine.fibers[machine.current];
    fiber.state = State::kBarrier;
    fiber.place = place;
    ++machine.at_barrier;
    open_barrier_if_complete();
    to_machine();
}

inline int lane() { return machine.current % kWarp; }

// Waits until every lane in the mask has come, then the last one runs `complete` on all operands.
template <typename Operand, typename Complete>
void meet(uint32_t mask, const char* name, Operand& operand, Complete complete) {
    const int warp = machine.current / kWarp, me = lane();
    const int lanes = std::min(kWarp, machine.count - warp * kWarp);
    if (lanes < kWarp) mask &= (1u << lanes) - 1;  // lanes that do not exist
    if (!(mask >> me & 1))
        fail(std::string(name) + ": lane " + std::to_string(me) + " calls it but is not in its mask");
    auto& meetings = machine.meetings[warp];
    auto meeting =
        std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.mask & mask; });
    if (meeting == meetings.end()) {
        meetings.emplace_back();
        meeting = meetings.end() - 1;
        meeting->mask = mask;
        meeting->name = name;
    }
    if (meeting->mask != mask || strcmp(meeting->name, name) != 0)
        fail(std::string("lanes of one warp meet in different collectives or with different masks: ") +
             meeting->name + " and " + name);
    meeting->arrived |= 1u << me;
    meeting->operand[me] = &operand;
    if (meeting->arrived == mask) {
        Operand* operands[kWarp] = {};
        for (int i = 0; i < kWarp; ++i) operands[i] = static_cast<Operand*>(meeting->operand[i]);
        meetings.erase(meeting);
        complete(operands);
        for (int i = 0; i < kWarp; ++i)
            if (mask >> i & 1) make_ready(warp * kWarp + i);
    } else {
        machine.fibers[machine.current].state = State::kCollective;
        machine.fibers[machine.current].place = name;
    }
    to_machine();
}

template <typename T>
struct Exchange {
    T value, result;
    int source;  // a lane, or -1: one's own value
};

template <typename T>
T exchange(uint32_t mask, const char* name, T value, int source) {
    Exchange<T> mine{value, value, source};
    meet(mask, name, mine, [mask, name](Exchange<T>** all) {
        for (int i = 0; i < kWarp; ++i) {
            if (all[i] == nullptr || all[i]->source < 0) continue;
            if (all[all[i]->source] == nullptr)
                fail(std::string(name) + ": lane " + std::to_string(i) + " reads lane " +
                     std::to_string(all[i]->source) + ", which takes no part");
            all[i]->result = all[all[i]->source]->value;
        }
    });
    return mine.result;
}

inline uint32_t ballot(uint32_t mask, const char* name, bool predicate) {
    Exchange<uint32_t> mine{predicate, 0, 0};
    meet(mask, name, mine, [](Exchange<uint32_t>** all) {
        uint32_t bits = 0;
        for (int i = 0; i < kWarp; ++i) bits |= all[i] != nullptr && all[i]->value ? 1u << i : 0;
        for (int i = 0; i < kWarp; ++i)
            if (all[i] != nullptr) all[i]->result = bits;
    });
    return mine.result;
}

inline void* dynamic_shared() { return machine.dynamic_shared.data(); }

}  // namespace emulator

#define EMULATOR_TEXT_(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_(x)
#define __syncthreads() ::emulator::barrier("__syncthreads " __FILE__ ":" EMULATOR_TEXT(__LINE__))

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    int nothing = 0;
    ::emulator::meet(mask, "__syncwarp", nothing, [](int**) {});
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    return ::emulator::exchange(mask, "__shfl_sync", value,
                                (::emulator::lane() & -width) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
    const int lane = ::emulator::lane(), source = lane ^ bits;
    return ::emulator::exchange(mask, "__shfl_xor_sync", value,
                                source >= (lane & -width) + width ? -1 : source);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32) {
    const int lane = ::emulator::lane(), source = lane + delta;
    return ::emulator::exchange(mask, "__shfl_down_sync", value,
                                source >= (lane & -width) + width ? -1 : source);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32) {
    const int lane = ::emulator::lane(), source = lane - delta;
    return ::emulator::exchange(mask, "__shfl_up_sync", value, source < (lane & -width) ? -1 : source);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
    return ::emulator::ballot(mask, "__ballot_sync", predicate);
}
inline int __any_sync(uint32_t mask, bool predicate) {
    return ::emulator::ballot(mask, "__any_sync", predicate) != 0;
}
inline int __all_sync(uint32_t mask, bool predicate) {
    return ::emulator::ballot(mask, "__all_sync", !predicate) == 0;
}
