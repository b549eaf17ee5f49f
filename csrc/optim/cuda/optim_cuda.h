// Launchers of the optimizer's CUDA kernels and the few runtime calls of its page store. They return nullptr,
// or the error.
#pragma once

#include <cstdint>

#include "optim/dynamic8.h"
#include "optim/segment.h"

namespace peftcore {
namespace optim {

struct Maps {
    Map means, squares;  // signed and unsigned
};

}  // namespace optim
}  // namespace peftcore

extern "C" {

// One launch for all segments, of the rule with this index in `Rules`. All pointers are device memory:
// `first_block` has count + 1 entries, the number of blocks of 256 elements before each segment.
const char* peftcore_optim_step(int rule, const peftcore::optim::Segment* segments,
                                const int64_t* first_block, int count, int64_t blocks,
                                const peftcore::optim::Scalars* rows, const peftcore::optim::Maps* maps,
                                void* stream);

// The functions below use the current device.
// Memory of the device from PyTorch's allocator. The memory may not be freed before its users have finished.
const char* peftcore_cuda_alloc(int64_t bytes, void** memory);
void peftcore_cuda_free(void* memory);
const char* peftcore_pinned_alloc(int64_t bytes, void** memory);
void peftcore_pinned_free(void* memory);
const char* peftcore_cuda_free_bytes(int64_t* bytes);
const char* peftcore_cuda_new_stream(void** stream);
void peftcore_cuda_delete_stream(void* stream);
// Event after all work queued on `stream` so far; nullptr if it could not be recorded.
const char* peftcore_cuda_record(void* stream, void** event);
void peftcore_cuda_delete_event(void* event);
const char* peftcore_cuda_wait_event(void* stream, void* event);
const char* peftcore_cuda_synchronize(void* stream);
const char* peftcore_cuda_synchronize_device();
// Copies in either direction between host and device.
const char* peftcore_cuda_copy(void* to, const void* from, int64_t bytes, void* stream);
const char* peftcore_cuda_zero(void* memory, int64_t bytes, void* stream);
// Whether a CUDA graph is being captured from `stream`.
const char* peftcore_cuda_capturing(void* stream, int* capturing);
}
