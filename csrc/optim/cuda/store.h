// The page store of a CUDA device. It uses the calls of optim_cuda.h and not PyTorch, so that a test can replace the
// runtime and make any call fail.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "optim/cuda/optim_cuda.h"
#include "optim/store.h"

namespace peftcore {
namespace optim {

inline void check_call(const char* error, const char* call) {
    if (error != nullptr) throw std::runtime_error(std::string(call) + " failed on CUDA: " + error);
}

// Pages in pinned memory of the host. Copies use two separate streams, one for each direction, so that a page arrives
// while another one leaves. Streams wait instead of threads: the copy into a frame waits for the copy of the frame's
// previous page out of it, and kernels wait for the event of their frame.
//
// `On` makes the store's device current for a scope, without creating a context on another one: PyTorch's guard.
// `current` gives the stream that kernels are launched on.
template <typename On>
class CudaStore : public Store {
 public:
    CudaStore(int device, int64_t page_bytes, void* (*current)(int device))
        : device_(device), page_bytes_(page_bytes), current_(current) {
        const On on(device_);
        check_call(peftcore_cuda_new_stream(&out_), "making a stream");
        if (const char* error = peftcore_cuda_new_stream(&in_)) {
            peftcore_cuda_delete_stream(out_);
            check_call(error, "making a stream");
        }
    }

    ~CudaStore() override {
        const On on(device_);
        for (void* stream : {out_, in_}) {
            peftcore_cuda_synchronize(stream);
            peftcore_cuda_delete_stream(stream);
        }
        for (void* page : pinned_) peftcore_pinned_free(page);
    }

    void* new_frame() override {
        const On on(device_);
        void* memory = nullptr;
        return peftcore_cuda_alloc(page_bytes_, &memory) == nullptr ? memory : nullptr;
    }

    // Its users are kernels on any stream of the caller, and copies on the two streams of this store.
    void delete_frame(void* frame) override {
        const On on(device_);
        peftcore_cuda_synchronize_device();
        peftcore_cuda_free(frame);
    }

    void reserve(int64_t pages) override {
        const On on(device_);
        const size_t before = pinned_.size();
        while (int64_t(pinned_.size()) < pages) {
            void* page = nullptr;
            const char* error = peftcore_pinned_alloc(page_bytes_, &page);
            if (error != nullptr) {
                for (; pinned_.size() > before; pinned_.pop_back()) peftcore_pinned_free(pinned_.back());
                throw std::runtime_error("optimizer state needs " + std::to_string(pages * page_bytes_) +
                                         " bytes of pinned host memory: " + error);
            }
            pinned_.push_back(page);
        }
    }

    void start(const std::shared_ptr<Transfer>& transfer) override {
        const On on(device_);
        void* last = current_(device_);  // kernels that use the frame come first
        const char* error = nullptr;
        if (transfer->out >= 0) {
            error = follow(last, out_);
            if (error == nullptr)
                error = peftcore_cuda_copy(pinned_[transfer->out], transfer->frame, page_bytes_, out_);
            transfer->written = error == nullptr;
            last = out_;
        }
        if (error == nullptr && transfer->in >= 0) {
            error = follow(last, in_);
            if (error != nullptr) {
                transfer->written = false;  // unknown whether it was; the frame still has it
            } else {
                last = in_;
                error = transfer->zero
                            ? peftcore_cuda_zero(transfer->frame, page_bytes_, in_)
                            : peftcore_cuda_copy(transfer->frame, pinned_[transfer->in], page_bytes_, in_);
            }
        }
        void* event = nullptr;
        if (peftcore_cuda_record(last, &event) == nullptr) {
            transfer->event = std::shared_ptr<void>(event, peftcore_cuda_delete_event);
        } else if (const char* unfinished = peftcore_cuda_synchronize(last)) {
            // Nothing can wait for the last copy or tell that it is done: its page does not count as written or
            // read.
            if (last == out_) transfer->written = false;
            if (error == nullptr) error = unfinished;
        }
        if (error != nullptr) transfer->error = std::string("a page cannot be copied: ") + error;
        transfer->done = true;
    }

    void wait(Transfer& transfer) override {
        if (transfer.event == nullptr) return;  // `start` has waited, or has set the error
        const On on(device_);
        check_call(peftcore_cuda_wait_event(current_(device_), transfer.event.get()), "waiting for an event");
    }

    void copy_from(const void* frame, int64_t offset, int64_t bytes, void* to) override {
        copy(to, static_cast<const char*>(frame) + offset, bytes);
    }

    void copy_to(void* frame, int64_t offset, int64_t bytes, const void* from) override {
        copy(static_cast<char*>(frame) + offset, from, bytes);
    }

    int64_t free_bytes() override {
        const On on(device_);
        int64_t bytes = 0;
        check_call(peftcore_cuda_free_bytes(&bytes), "asking for free memory");
        return bytes;
    }

    std::string place() const override { return "pinned memory"; }

 private:
    // Work queued on `second` from here on runs after the work already queued on `first`.
    static const char* follow(void* first, void* second) {
        void* event = nullptr;
        if (peftcore_cuda_record(first, &event) != nullptr) return peftcore_cuda_synchronize(first);
        const char* error = peftcore_cuda_wait_event(second, event);
        peftcore_cuda_delete_event(event);
        return error;
    }

    void copy(void* to, const void* from, int64_t bytes) {
        const On on(device_);
        check_call(peftcore_cuda_copy(to, from, bytes, current_(device_)), "copying a page");
        check_call(peftcore_cuda_synchronize(current_(device_)), "copying a page");
    }

    const int device_;
    const int64_t page_bytes_;
    void* (*const current_)(int);
    void *out_ = nullptr, *in_ = nullptr;
    std::vector<void*> pinned_;
};

}  // namespace optim
}  // namespace peftcore
