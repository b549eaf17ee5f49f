// The stream PyTorch currently launches on, without a CUDA header of PyTorch: so this compiles beside a CPU
// build.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <cstdint>

// From PyTorch's C shim, whose names stay over releases (torch/csrc/inductor/aoti_torch/c/shim.h). Weak: a
// CPU build has none.
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
