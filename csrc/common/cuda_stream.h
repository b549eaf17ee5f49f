// The stream PyTorch currently launches on, without PyTorch's CUDA headers: this also compiles with a CPU build of
// PyTorch.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <cstdint>

// From PyTorch's C shim, whose names are stable across releases (torch/csrc/inductor/aoti_torch/c/shim.h). Weak,
// because a CPU build does not define it.
extern "C" __attribute__((weak, visibility("default"))) int32_t
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace peftcore {

inline void* current_cuda_stream(const c10::Device& device) {
    TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of PyTorch has no CUDA");
    void* stream = nullptr;
    TORCH_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream) == 0,
                "no current CUDA stream on ", device);
    return stream;
}

}  // namespace peftcore
