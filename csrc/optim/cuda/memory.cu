// The runtime calls of the page store on CUDA, on the current device. The emulator has kernels only.
#if !defined(PEFTCORE_EMULATOR)

#include <cuda_runtime.h>

#include "optim/cuda/optim_cuda.h"

namespace {

const char* text(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    (void)cudaGetLastError();  // else the next launch would report it
    return cudaGetErrorString(error);
}

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

extern "C" {

const char* peftcore_pinned_alloc(int64_t bytes, void** memory) {
    return text(cudaMallocHost(memory, size_t(bytes)));
}

void peftcore_pinned_free(void* memory) { cudaFreeHost(memory); }

const char* peftcore_cuda_free_bytes(int64_t* bytes) {
    size_t available = 0, total = 0;
    const char* error = text(cudaMemGetInfo(&available, &total));
    *bytes = int64_t(available);
    return error;
}

const char* peftcore_cuda_new_stream(void** stream) {
    return text(cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking));
}

void peftcore_cuda_delete_stream(void* stream) { cudaStreamDestroy(stream_of(stream)); }

const char* peftcore_cuda_record(void* stream, void** event) {
    cudaEvent_t created = nullptr;
    *event = nullptr;
    if (const char* error = text(cudaEventCreateWithFlags(&created, cudaEventDisableTiming))) return error;
    if (const char* error = text(cudaEventRecord(created, stream_of(stream)))) {
        cudaEventDestroy(created);  // an event that was never recorded counts as complete
        return error;
    }
    *event = created;
    return nullptr;
}

void peftcore_cuda_delete_event(void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }

const char* peftcore_cuda_wait_event(void* stream, void* event) {
    return text(cudaStreamWaitEvent(stream_of(stream), static_cast<cudaEvent_t>(event), 0));
}

const char* peftcore_cuda_synchronize_device() { return text(cudaDeviceSynchronize()); }

const char* peftcore_cuda_synchronize(void* stream) { return text(cudaStreamSynchronize(stream_of(stream))); }

const char* peftcore_cuda_copy(void* to, const void* from, int64_t bytes, void* stream) {
    return text(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, stream_of(stream)));
}

const char* peftcore_cuda_zero(void* memory, int64_t bytes, void* stream) {
    return text(cudaMemsetAsync(memory, 0, size_t(bytes), stream_of(stream)));
}

const char* peftcore_cuda_capturing(void* stream, int* capturing) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const char* error = text(cudaStreamIsCapturing(stream_of(stream), &status));
    *capturing = status != cudaStreamCaptureStatusNone;
    return error;
}
}

#endif
