// The CUDA runtime and PyTorch's current stream, as csrc/*/cuda/*.cpp use them, on the CPU. Included once, by the
// unit of tests/emulator/building.py.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "optim/cuda/optim_cuda.h"
#include "optim/rule_table.h"

extern "C" {

// `planes`: of each plane whether it has bytes, and how many elements share a value.
void emulator_define_rule(const char* name, const int64_t (*planes)[2], int count, const char* scalars) {
    std::vector<peftcore::optim::Plane> table;
    for (int i = 0; i < count; ++i) table.push_back({planes[i][0] ? c10::kByte : c10::kFloat, planes[i][1]});
    peftcore::optim::define_rule(name, table, scalars);
}

static void* emulator_stream = nullptr;

// The current stream from now on: 0, the null stream, or another one, which has no counters and no clusters.
void emulator_use_stream(int number) { emulator_stream = reinterpret_cast<void*>(intptr_t(number)); }

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = emulator_stream;
    return 0;
}

int peftcore_cuda_has_code() { return 1; }

const char* peftcore_cuda_alloc(int64_t bytes, void** memory) {
    *memory = std::malloc(size_t(bytes));
    return *memory == nullptr ? "out of memory" : nullptr;
}
void peftcore_cuda_free(void* memory) { std::free(memory); }
const char* peftcore_pinned_alloc(int64_t bytes, void** memory) { return peftcore_cuda_alloc(bytes, memory); }
void peftcore_pinned_free(void* memory) { std::free(memory); }
const char* peftcore_cuda_free_bytes(int64_t* bytes) {
    *bytes = int64_t(1) << 30;
    return nullptr;
}
const char* peftcore_cuda_new_stream(void** stream) {
    *stream = nullptr;
    return nullptr;
}
void peftcore_cuda_delete_stream(void*) {}
const char* peftcore_cuda_record(void*, void** event) {
    *event = nullptr;
    return nullptr;
}
void peftcore_cuda_delete_event(void*) {}
const char* peftcore_cuda_wait_event(void*, void*) { return nullptr; }
const char* peftcore_cuda_synchronize_device() { return nullptr; }
const char* peftcore_cuda_synchronize(void*) { return nullptr; }
const char* peftcore_cuda_copy(void* to, const void* from, int64_t bytes, void*) {
    std::memcpy(to, from, size_t(bytes));
    return nullptr;
}
const char* peftcore_cuda_zero(void* memory, int64_t bytes, void*) {
    std::memset(memory, 0, size_t(bytes));
    return nullptr;
}
int emulator_capturing = 0;  // set by a test
const char* peftcore_cuda_capturing(void*, int* capturing) {
    *capturing = emulator_capturing;
    return nullptr;
}
}
