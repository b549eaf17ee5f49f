// Runs CUDA kernels on the CPU: a .cu file that includes common/cuda_launch.cuh compiles with a C++ compiler
// and -DPEFTCORE_EMULATOR, with this header in CUDA's place.
//
// Every thread of a block is a fiber. A fiber runs until it waits: at a barrier, in a warp collective, or at
// its end. Which one runs next, and the order of blocks, are drawn from a seed, with some warps far ahead of
// others, so threads that need a barrier and have none meet each other's data too early or too late under
// some seed. Before each block, shared memory is filled with 0xff (NaN, -1): nothing is inherited from the
// block before.
//
// What it finds: wrong arithmetic and indexing, missing barriers (over seeds), barriers that not all threads
// reach, collectives whose mask names lanes that do not come, reads before a cp.async was waited for; and
// under AddressSanitizer and UndefinedBehaviorSanitizer, accesses out of range and misaligned vectors. What
// it cannot find: anything about speed, memory ordering between blocks, and races within one stretch between
// two waits.
//
// A launch returns nullptr or what went wrong. One launch at a time: the emulator has one state.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// --- the language
// -----------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// --- fibers
// -----------------------------------------------------------------------------------------------------------

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarp = 32;

enum class State { kReady, kBarrier, kCollective, kDone };

struct Copy {  // a cp.async on its way
    void* to;
    const void* from;
    int bytes, zeros;
};

struct Fiber {
    char* stack = nullptr;
#if defined(__x86_64__)
    void* sp = nullptr;
#else
    ucontext_t context;
#endif
    void* fake_stack = nullptr;  // AddressSanitizer's
    State state = State::kReady;
    const char* place = "";  // what it waits at
    dim3 index;
    std::vector<Copy> copies;               // not yet committed
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// Lanes that wait for each other in one collective operation.
struct Meeting {
    uint32_t mask = 0, arrived = 0;
    const char* name = "";
    void* operand[kWarp] = {};
};

struct Machine {
    uint64_t seed = 0, random = 0;
    std::vector<Fiber> fibers;
    std::vector<int> ready;
    std::vector<uint64_t> warp_order;            // lowest first; empty: any thread
    std::vector<std::vector<Meeting>> meetings;  // of each warp
    int count = 0, alive = 0, at_barrier = 0, current = -1;
    const char* barrier = nullptr;
    std::function<void()> kernel;
    std::vector<std::pair<void*, size_t>> shared;  // static arrays met so far
    std::vector<char> dynamic_shared;
    std::string error;
#if defined(__x86_64__)
    void* sp = nullptr;
#else
    ucontext_t context;
#endif
    const void* main_stack = nullptr;
    size_t main_stack_bytes = 0;
    void* main_fake_stack = nullptr;

    uint64_t draw() {  // splitmix64
        uint64_t z = random += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
};

inline Machine machine;

#if defined(__x86_64__)
// Saves the registers a call must preserve, and the stack; takes up another's.
__attribute__((naked, noinline)) inline void switch_stack(void** /* save */, void* /* load */) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

inline void to_machine(bool for_good = false) {
    Fiber& fiber = machine.fibers[machine.current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, machine.main_stack,
                                   machine.main_stack_bytes);
#endif
    (void)for_good;
#if defined(__x86_64__)
    switch_stack(&fiber.sp, machine.sp);
#else
    swapcontext(&fiber.context, &machine.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void make_ready(int thread) {
    machine.fibers[thread].state = State::kReady;
    machine.ready.push_back(thread);
}

inline void open_barrier_if_complete() {
    if (machine.alive == 0 || machine.at_barrier != machine.alive) return;
    machine.at_barrier = 0;
    machine.barrier = nullptr;
    for (int i = 0; i < machine.count; ++i)
        if (machine.fibers[i].state == State::kBarrier) make_ready(i);
}

[[noreturn]] inline void fail(const std::string& message) {
    if (machine.error.empty()) machine.error = message;
    to_machine(true);
    abort();  // a failed block's fibers are not resumed
}

[[noreturn]] inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_bytes);
#endif
    machine.kernel();
    machine.fibers[machine.current].state = State::kDone;
    --machine.alive;
    open_barrier_if_complete();  // threads that have ended are not waited for
    to_machine(true);
    abort();
}

inline void prepare(Fiber& fiber) {
    if (fiber.stack == nullptr) {
        void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            perror("emulator: no memory for a stack");
            abort();
        }
        mprotect(memory, 4096, PROT_NONE);  // an overflow faults
        fiber.stack = static_cast<char*>(memory);
    }
    fiber.fake_stack = nullptr;
    fiber.copies.clear();
    fiber.groups.clear();
#if defined(__x86_64__)
    // As after a call: the return address of fiber_main lies on a multiple of 16, six registers below it.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
    top[0] = reinterpret_cast<void*>(&fiber_main);
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
    fiber.sp = top - 6;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
}

inline void resume(int thread) {
    Fiber& fiber = machine.fibers[thread];
    machine.current = thread;
    threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&machine.main_fake_stack, fiber.stack, kStackBytes);
#endif
#if defined(__x86_64__)
    switch_stack(&machine.sp, fiber.sp);
#else
    swapcontext(&machine.context, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(machine.main_fake_stack, nullptr, nullptr);
#endif
}

// --- launches
// ---------------------------------------------------------------------------------------------------------

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

// --- barriers and collectives
// -----------------------------------------------------------------------------------------

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

// --- arithmetic
// -------------------------------------------------------------------------------------------------------
// Compile with -ffp-contract=off: nothing is fused that CUDA's functions keep apart.

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
template <typename T>
T __ldg(const T* address) {
    return *address;
}
template <typename T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = before + value;
    return before;
}
inline void __threadfence() {}
