// The runtime calls of the page store on CUDA. The emulator has kernels only.
#if !defined(PEFTCORE_EMULATOR)

#include <cuda_runtime.h>

#include "optim/cuda/optim_cuda.h"

namespace {

const char* text(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    (void)cudaGetLastError();  // not for the next launch to find
    return cudaGetErrorString(error);
}

// Calls happen on a device, and leave the thread on its own.
class On {
 public:
    explicit On(int device) {
        cudaGetDevice(&before_);
        cudaSetDevice(device);
    }
    ~On() { cudaSetDevice(before_); }

 private:
    int before_ = 0;
};

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

extern "C" {

const char* peftcore_cuda_alloc(int device, int64_t bytes, void** memory) {
    const On on(device);
    return text(cudaMalloc(memory, size_t(bytes)));
}

void peftcore_cuda_free(int device, void* memory) {
    const On on(device);
    cudaFree(memory);
}

const char* peftcore_pinned_alloc(int64_t bytes, void** memory) {
    return text(cudaMallocHost(memory, size_t(bytes)));
}

void peftcore_pinned_free(void* memory) { cudaFreeHost(memory); }

const char* peftcore_cuda_free_bytes(int device, int64_t* bytes) {
    const On on(device);
    size_t available = 0, total = 0;
    const char* error = text(cudaMemGetInfo(&available, &total));
    *bytes = int64_t(available);
    return error;
}

const char* peftcore_cuda_new_stream(int device, void** stream) {
    const On on(device);
    return text(cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking));
}

void peftcore_cuda_delete_stream(int device, void* stream) {
    const On on(device);
    cudaStreamDestroy(stream_of(stream));
}

const char* peftcore_cuda_record(int device, void* stream, void** event) {
    const On on(device);
    cudaEvent_t made = nullptr;
    if (const char* error = text(cudaEventCreateWithFlags(&made, cudaEventDisableTiming))) return error;
    *event = made;
    return text(cudaEventRecord(made, stream_of(stream)));
}

void peftcore_cuda_delete_event(void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }

const char* peftcore_cuda_wait_event(int device, void* stream, void* event) {
    const On on(device);
    return text(cudaStreamWaitEvent(stream_of(stream), static_cast<cudaEvent_t>(event), 0));
}

const char* peftcore_cuda_synchronize(int device, void* stream) {
    const On on(device);
    return text(cudaStreamSynchronize(stream_of(stream)));
}

const char* peftcore_cuda_copy(int device, void* to, const void* from, int64_t bytes, void* stream) {
    const On on(device);
    return text(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, stream_of(stream)));
}

const char* peftcore_cuda_zero(int device, void* memory, int64_t bytes, void* stream) {
    const On on(device);
    return text(cudaMemsetAsync(memory, 0, size_t(bytes), stream_of(stream)));
}
}

#endif
