// Optimizer steps on CUDA, state in tensors or in a pool whose pages lie in pinned memory. Schemas:
// peftcore/ops/optim.py.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>

#include "common/cuda_stream.h"
#include "common/cuda_support.h"
#include "optim/cuda/optim_cuda.h"
#include "optim/cuda/store.h"
#include "optim/paged.h"

namespace peftcore {
namespace optim {
namespace {

struct OnDevice {
    explicit OnDevice(int device) : guard(c10::Device(c10::kCUDA, c10::DeviceIndex(device))) {}
    c10::DeviceGuard guard;
};

void* stream_of_device(int device) {
    return current_cuda_stream(c10::Device(c10::kCUDA, c10::DeviceIndex(device)));
}

void refuse_capture(const c10::Device& device, const char* op) {
    int capturing = 0;
    const char* error = peftcore_cuda_capturing(current_cuda_stream(device), &capturing);
    TORCH_CHECK(error == nullptr, op, ": ", error);
    TORCH_CHECK(!capturing, op,
                ": a CUDA graph cannot hold an optimizer's step, whose scalars the host counts. "
                "Capture forward and backward, and call step() after each replay");
}

// The tables of a launch in one buffer on the device: one copy, whatever the number of parameters.
void launch(const Step& step, const std::vector<Segment>& segments, const c10::Device& device,
            const char* op) {
    refuse_capture(device, op);
    const size_t count = segments.size();
    std::vector<int64_t> first_block(count + 1, 0);
    for (size_t i = 0; i < count; ++i) first_block[i + 1] = first_block[i] + blocks_of(segments[i].count);
    const Maps maps = {signed_map(), unsigned_map()};
    const std::pair<const void*, size_t> parts[] = {
        {segments.data(), count * sizeof(Segment)},
        {first_block.data(), (count + 1) * sizeof(int64_t)},
        {step.rows.data(), step.rows.size() * sizeof(Scalars)},
        {&maps, step.rule == Rule::kAdamW8bit ? sizeof(Maps) : 0}};
    size_t offset[5] = {};
    for (int i = 0; i < 4; ++i) offset[i + 1] = offset[i] + (parts[i].second + 15) / 16 * 16;
    const at::TensorOptions bytes = at::TensorOptions().dtype(at::kByte);
    at::Tensor host = at::empty({int64_t(offset[4])}, bytes.pinned_memory(true));
    char* to = static_cast<char*>(host.mutable_data_ptr());
    for (int i = 0; i < 4; ++i) std::memcpy(to + offset[i], parts[i].first, parts[i].second);
    const at::Tensor table = at::empty({int64_t(offset[4])}, bytes.device(device));
    table.copy_(host, /*non_blocking=*/true);
    const char* from = static_cast<const char*>(table.const_data_ptr());
    const char* error =
        peftcore_optim_step(int(step.rule), reinterpret_cast<const Segment*>(from),
                            reinterpret_cast<const int64_t*>(from + offset[1]), int(count),
                            first_block[count], reinterpret_cast<const Scalars*>(from + offset[2]),
                            reinterpret_cast<const Maps*>(from + offset[3]), current_cuda_stream(device));
    TORCH_CHECK(error == nullptr, op, ": the CUDA kernel was not launched: ", error);
}

void optim_step_(at::TensorList params, at::TensorList grads, at::TensorList state, std::string_view rule,
                 at::ArrayRef<double> scalars, at::IntArrayRef steps, at::IntArrayRef rows,
                 at::IntArrayRef streams) {
    const char* op = "optim_step_";
    if (params.empty()) return;
    const c10::DeviceGuard guard(params[0].device());
    Step step = step_arguments(params, grads, rule, scalars, steps, rows, streams, op);
    attach_state(step, state, params[0].device(), op);
    launch(step, step.segments, params[0].device(), op);
}

void optim_step_paged_(at::TensorList params, at::TensorList grads, int64_t pool, at::IntArrayRef slots,
                       std::string_view rule, at::ArrayRef<double> scalars, at::IntArrayRef steps,
                       at::IntArrayRef rows, at::IntArrayRef streams, int64_t sweep, bool backward) {
    const char* op = "optim_step_paged_";
    if (params.empty()) return;
    const c10::Device device = params[0].device();
    const c10::DeviceGuard guard(device);
    const Step step = step_arguments(params, grads, rule, scalars, steps, rows, streams, op);
    sweep_pages(*pool_of(pool, op), step, slots, sweep, backward, op,
                [&](const std::vector<Segment>& segments, bool) { launch(step, segments, device, op); });
}

}  // namespace

std::unique_ptr<Store> make_cuda_store(int device, int64_t page_bytes) {
    return std::make_unique<CudaStore<OnDevice>>(device, page_bytes, &stream_of_device);
}

TORCH_LIBRARY_IMPL(peftcore, CUDA, m) {
    m.impl("optim_step_", &OrReference<"peftcore::optim_step_", "", &optim_step_>::call);
    m.impl("optim_step_paged_", &optim_step_paged_);
}

}  // namespace optim
}  // namespace peftcore
