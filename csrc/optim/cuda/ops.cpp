// Optimizer steps on CUDA, with state in tensors or in pages of pinned memory.
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>
#include <string>

#include "common/cuda_stream.h"
#include "common/cuda_support.h"
#include "optim/cuda/optim_cuda.h"
#include "optim/cuda/store.h"
#include "optim/dynamic8.h"
#include "optim/operators.h"

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

void refuse_capture(const Step& step, const char* op) {
    if (step.segments.empty()) return;
    const c10::DeviceGuard guard(step.device);
    int capturing = 0;
    const char* error = peftcore_cuda_capturing(current_cuda_stream(step.device), &capturing);
    TORCH_CHECK(error == nullptr, op, ": ", error);
    TORCH_CHECK(!capturing, op,
                ": a CUDA graph cannot hold an optimizer's step, whose scalars the host counts. "
                "Capture forward and backward, and call step() after each replay");
}

// Tables of a launch in one buffer of the device: one copy, whatever the number of parameters.
class LaunchTables {
 public:
    template <typename T>
    void add(const T* values, size_t count) {
        tables_.push_back({values, count * sizeof(T), bytes_});
        bytes_ += (count * sizeof(T) + 15) / 16 * 16;
    }

    void copy_to(const c10::Device& device) {
        const at::TensorOptions bytes = at::TensorOptions().dtype(at::kByte);
        const at::Tensor host = at::empty({bytes_}, bytes.pinned_memory(true));
        char* begin = static_cast<char*>(host.mutable_data_ptr());
        for (const Table& table : tables_) std::memcpy(begin + table.offset, table.values, table.bytes);
        on_device_ = at::empty({bytes_}, bytes.device(device));
        on_device_.copy_(host, /*non_blocking=*/true);
    }

    // The table that was added as number `number`, from 0.
    template <typename T>
    const T* at(size_t number) const {
        return reinterpret_cast<const T*>(static_cast<const char*>(on_device_.const_data_ptr()) +
                                          tables_[number].offset);
    }

 private:
    struct Table {
        const void* values;
        size_t bytes;
        int64_t offset;
    };
    std::vector<Table> tables_;
    int64_t bytes_ = 0;
    at::Tensor on_device_;
};

void update(const Step& step, const std::vector<Segment>& segments, int64_t) {
    const char* op = "optim_step_";
    if (segments.empty()) return;
    const c10::DeviceGuard guard(step.device);
    const size_t count = segments.size();
    std::vector<int64_t> first_block(count + 1, 0);
    for (size_t i = 0; i < count; ++i) first_block[i + 1] = first_block[i] + blocks_of(segments[i].count);
    const Maps maps = {signed_map(), unsigned_map()};
    LaunchTables tables;
    tables.add(segments.data(), count);
    tables.add(first_block.data(), count + 1);
    tables.add(step.rows.data(), step.rows.size());
    tables.add(&maps, 1);
    tables.copy_to(step.device);
    check_launch(peftcore_optim_step(step.rule.number, tables.at<Segment>(0), tables.at<int64_t>(1),
                                     int(count), first_block[count], tables.at<Scalars>(2),
                                     tables.at<Maps>(3), current_cuda_stream(step.device)),
                 op);
}

}  // namespace

std::unique_ptr<Store> make_cuda_store(int device, int64_t page_bytes) {
    return std::make_unique<CudaStore<OnDevice>>(device, page_bytes, &stream_of_device);
}

TORCH_LIBRARY_IMPL(peftcore, CUDA, m) {
    using Own = Operators<update, refuse_capture>;
    m.impl("optim_step_", &OrReference<"peftcore::optim_step_", "", &Own::optim_step_>::call);
    m.impl("optim_step_paged_", &Own::optim_step_paged_);
}

}  // namespace optim
}  // namespace peftcore

#if !defined(PEFTCORE_EMULATOR)

// Frames come from the allocator of the model's tensors, so that memory which PyTorch has reserved serves for them.
extern "C" const char* peftcore_cuda_alloc(int64_t bytes, void** memory) {
    static thread_local std::string message;
    try {
        *memory = c10::GetAllocator(c10::kCUDA)->raw_allocate(size_t(bytes));
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

extern "C" void peftcore_cuda_free(void* memory) { c10::GetAllocator(c10::kCUDA)->raw_deallocate(memory); }

#endif
