// The threads of a block as fibers: their stacks, who waits, and the switch between them and the machine.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "emulator_language.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarp = 32;

enum class State { kReady, kBarrier, kCollective, kCluster, kDone };

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

// What is a block's own.
struct Block {
    dim3 index;
    std::vector<Fiber> fibers;
    std::vector<int> ready;
    std::vector<uint64_t> warp_order;            // lowest first; empty: any thread
    std::vector<std::vector<Meeting>> meetings;  // of each warp
    int count = 0, alive = 0, at_barrier = 0, at_cluster = 0;
    const char* barrier = nullptr;
    std::vector<char> dynamic_shared;
    std::vector<std::vector<char>> shared;  // static arrays, of a block that is put aside
};

struct Machine : Block {  // the block that runs
    uint64_t seed = 0, random = 0, launches = 0;
    int current = -1;
    std::function<void()> kernel;
    std::vector<std::pair<void*, size_t>> arrays;  // static ones met so far
    std::vector<Block> cluster;  // put aside; as many as the largest had, for their stacks stay
    unsigned cluster_size = 1, in_cluster = 0;  // and the number of the block that runs
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

}  // namespace emulator
