// Optimizer steps on CUDA, state in tensors or in a pool whose pages lie in pinned memory. Schemas:
// peftcore/ops/optim.py.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>

#include "common/cuda_stream.h"
#include "optim/cuda/optim_cuda.h"
#include "optim/paged.h"

namespace peftcore {
namespace optim {
namespace {

void check_call(const char* error, const char* what) {
    TORCH_CHECK(error == nullptr, what, " failed on CUDA: ", error);
}

// Pages in pinned memory of the host; copies go over a stream of their own, and streams wait, not threads.
class CudaStore : public Store {
 public:
    CudaStore(int device, int64_t page_bytes) : device_(device), page_bytes_(page_bytes) {
        check_call(peftcore_cuda_new_stream(device_, &stream_), "making a stream");
    }

    ~CudaStore() override {
        peftcore_cuda_synchronize(device_, stream_);
        peftcore_cuda_delete_stream(device_, stream_);
        for (void* page : pinned_) peftcore_pinned_free(page);
    }

    void* new_frame() override {
        void* memory = nullptr;
        return peftcore_cuda_alloc(device_, page_bytes_, &memory) == nullptr ? memory : nullptr;
    }

    // cudaFree waits for all that uses the memory.
    void delete_frame(void* frame) override { peftcore_cuda_free(device_, frame); }

    void reserve(int64_t pages) override {
        const size_t before = pinned_.size();
        while (int64_t(pinned_.size()) < pages) {
            void* page = nullptr;
            const char* error = peftcore_pinned_alloc(page_bytes_, &page);
            if (error != nullptr) {
                for (; pinned_.size() > before; pinned_.pop_back()) peftcore_pinned_free(pinned_.back());
                throw std::runtime_error("optimizer state needs " + std::to_string(pages * page_bytes_) +
                                         " bytes of pinned memory beside the card: " + error);
            }
            pinned_.push_back(page);
        }
    }

    void start(const std::shared_ptr<Transfer>& transfer) override {
        follow(current(), stream_);  // kernels that use the frame come first
        const char* error = nullptr;
        if (transfer->out >= 0) {
            error =
                peftcore_cuda_copy(device_, pinned_[transfer->out], transfer->frame, page_bytes_, stream_);
            transfer->written = error == nullptr;
        }
        if (error == nullptr && transfer->in >= 0)
            error = transfer->zero ? peftcore_cuda_zero(device_, transfer->frame, page_bytes_, stream_)
                                   : peftcore_cuda_copy(device_, transfer->frame, pinned_[transfer->in],
                                                        page_bytes_, stream_);
        if (error != nullptr) transfer->error = std::string("a page cannot be copied: ") + error;
        void* event = nullptr;
        check_call(peftcore_cuda_record(device_, stream_, &event), "recording an event");
        transfer->event = std::shared_ptr<void>(event, peftcore_cuda_delete_event);
        transfer->done = true;
    }

    void wait(Transfer& transfer) override {
        check_call(peftcore_cuda_wait_event(device_, current(), transfer.event.get()),
                   "waiting for an event");
    }

    void copy_from(const void* frame, int64_t offset, int64_t bytes, void* to) override {
        copy(to, static_cast<const char*>(frame) + offset, bytes);
    }

    void copy_to(void* frame, int64_t offset, int64_t bytes, const void* from) override {
        copy(static_cast<char*>(frame) + offset, from, bytes);
    }

    int64_t free_bytes() override {
        int64_t bytes = 0;
        check_call(peftcore_cuda_free_bytes(device_, &bytes), "asking for free memory");
        return bytes;
    }

    std::string place() const override { return "pinned memory"; }

 private:
    void* current() const { return current_cuda_stream(c10::Device(c10::kCUDA, c10::DeviceIndex(device_))); }

    void follow(void* first, void* second) {
        void* event = nullptr;
        check_call(peftcore_cuda_record(device_, first, &event), "recording an event");
        const char* error = peftcore_cuda_wait_event(device_, second, event);
        peftcore_cuda_delete_event(event);
        check_call(error, "waiting for an event");
    }

    void copy(void* to, const void* from, int64_t bytes) {
        check_call(peftcore_cuda_copy(device_, to, from, bytes, current()), "copying a page");
        check_call(peftcore_cuda_synchronize(device_, current()), "copying a page");
    }

    const int device_;
    const int64_t page_bytes_;
    void* stream_ = nullptr;
    std::vector<void*> pinned_;
};

// The tables of a launch in one buffer on the device: one copy, whatever the number of parameters.
void launch(const Step& step, const std::vector<Segment>& segments, const c10::Device& device,
            const char* op) {
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
    attach_state(step, state, op);
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
    return std::make_unique<CudaStore>(device, page_bytes);
}

TORCH_LIBRARY_IMPL(peftcore, CUDA, m) {
    m.impl("optim_step_", &optim_step_);
    m.impl("optim_step_paged_", &optim_step_paged_);
}

}  // namespace optim
}  // namespace peftcore
