// The page store of a card over a runtime of the test's, any call of which can fail: built with
// csrc/optim/pool.cpp and run by test_cuda_store.py. Nothing here needs CUDA or PyTorch.
//
// Work on streams is done late, in any order that streams and events leave open: drawn anew for every run.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "optim/cuda/store.h"
#include "optim/pool.h"

namespace {

int device = 3, switched = 0;  // the caller's device; how often it was left
long fail_record = -1, fail_copy = -1, fail_synchronize = -1, records = 0, copies = 0, synchronizes = 0;

using Event = std::shared_ptr<bool>;               // whether it is over
using Stream = std::deque<std::function<bool()>>;  // what waits returns false
std::map<void*, Event> events;
std::map<void*, Stream> streams;
std::mt19937 order;
char current;           // the stream of kernels
long frames_left = -1;  // of the device's memory; -1: any number
long together = 0;      // how often a copy began while the other stream had one

// One piece of work of any stream that can go on.
bool advance() {
    std::vector<Stream*> all;
    for (auto& [name, stream] : streams) all.push_back(&stream);
    std::shuffle(all.begin(), all.end(), order);
    for (Stream* stream : all)
        if (!stream->empty() && stream->front()()) {
            stream->pop_front();
            return true;
        }
    return false;
}

const char* failing(long& count, long at) { return ++count == at ? "unspecified launch failure" : nullptr; }

struct On {
    explicit On(int wanted) : before(device) {
        if (device != wanted) ++switched;
        device = wanted;
    }
    ~On() { device = before; }
    int before;
};

void require(bool holds, const char* what) {
    if (holds) return;
    std::printf("%s\n", what);
    std::exit(1);
}

void finish(Stream& stream) {
    while (!stream.empty())
        if (!advance()) {
            std::printf("streams wait for each other\n");
            std::exit(1);
        }
}

void add(void* stream, std::function<bool()> work) {
    streams[stream].push_back(std::move(work));
    for (unsigned steps = order() % 3; steps > 0; --steps) advance();
}

void here() { require(device == 7, "a runtime call on another device than the store's"); }

}  // namespace

extern "C" {

const char* peftcore_cuda_alloc(int64_t bytes, void** memory) {
    here();
    if (frames_left == 0) return "out of memory";
    --frames_left;
    *memory = std::malloc(size_t(bytes));
    return nullptr;
}
void peftcore_cuda_free(void* memory) {
    here();
    std::free(memory);
}
const char* peftcore_pinned_alloc(int64_t bytes, void** memory) {
    here();
    *memory = std::malloc(size_t(bytes));
    return nullptr;
}
void peftcore_pinned_free(void* memory) { std::free(memory); }
const char* peftcore_cuda_free_bytes(int64_t* bytes) {
    here();
    *bytes = 1 << 20;
    return nullptr;
}
const char* peftcore_cuda_new_stream(void** stream) {
    here();
    *stream = std::malloc(1);
    return nullptr;
}
void peftcore_cuda_delete_stream(void* stream) {
    require(streams[stream].empty(), "a stream goes before its work is done");
    streams.erase(stream);
    std::free(stream);
}
const char* peftcore_cuda_record(void* stream, void** event) {
    here();
    *event = nullptr;
    if (const char* error = failing(records, fail_record)) return error;
    const Event over = events[*event = std::malloc(1)] = std::make_shared<bool>(false);
    add(stream, [over] { return *over = true; });
    return nullptr;
}
void peftcore_cuda_delete_event(void* event) {
    require(events.erase(event) == 1, "an event that was never recorded is deleted");
    std::free(event);
}
const char* peftcore_cuda_wait_event(void* stream, void* event) {
    here();
    require(events.count(event) == 1, "an event that was never recorded is waited for");
    add(stream, [over = events[event]] { return *over; });
    return nullptr;
}
const char* peftcore_cuda_synchronize_device() {
    here();
    for (auto& [name, stream] : streams) finish(stream);
    return nullptr;
}
const char* peftcore_cuda_synchronize(void* stream) {
    here();
    if (const char* error = failing(synchronizes, fail_synchronize)) return error;
    finish(streams[stream]);
    return nullptr;
}
const char* peftcore_cuda_copy(void* to, const void* from, int64_t bytes, void* stream) {
    here();
    if (const char* error = failing(copies, fail_copy)) return error;
    size_t others = 0;
    for (const auto& [name, other] : streams) others += name != stream && name != &current && !other.empty();
    if (stream != &current) together += long(others);
    add(stream, [=] { return std::memcpy(to, from, size_t(bytes)) != nullptr; });
    return nullptr;
}
const char* peftcore_cuda_zero(void* memory, int64_t bytes, void* stream) {
    here();
    add(stream, [=] { return std::memset(memory, 0, size_t(bytes)) != nullptr; });
    return nullptr;
}
}

// A device without memory for the first frame says so, and one with memory for one frame of three pages through it.
void run_out_of_memory() {
    using namespace peftcore::optim;
    Pool pool(std::make_unique<CudaStore<On>>(7, 64, [](int) -> void* { return &current; }), 64, 3 * 64);
    pool.grow(2);
    frames_left = 0;
    try {
        pool.acquire(0);
        require(false, "a page without memory was acquired");
    } catch (const std::runtime_error& error) {
        require(std::strstr(error.what(), "there is no memory for a page of 64 bytes") != nullptr,
                error.what());
    }
    frames_left = 1;
    for (int64_t page : {0, 1, 0}) {
        pool.acquire(page);
        pool.release(page, true);
    }
    require(pool.resident_bytes() == 64, "more than one page is resident");
    frames_left = -1;
}

// Writes numbered pages through a budget of two, while one call after the other fails, and reads them back.
int main() {
    using namespace peftcore::optim;
    constexpr int64_t kPage = 64, kPages = 5;
    long faults = 0;
    for (int kind = 0; kind < 3; ++kind) {
        for (long at = 1; at < 40; ++at) {
            records = copies = synchronizes = 0;
            fail_record = fail_copy = fail_synchronize = -1;
            {
                Pool pool(std::make_unique<CudaStore<On>>(7, kPage, [](int) -> void* { return &current; }),
                          kPage, 2 * kPage);
                pool.grow(kPages);
                if (kind == 0) fail_record = at;
                if (kind == 1) fail_copy = at;
                if (kind == 2)
                    fail_record = at, fail_synchronize = 1;  // the one that stands in for the event
                for (int round = 0; round < 2; ++round) {
                    for (int64_t page = 0; page < kPages; ++page) {
                        const int value = int(10 * (round + 1) + page);
                        for (int attempt = 0;; ++attempt) {
                            require(attempt < 4, "a fault that is over still fails");
                            try {
                                void* frame = pool.acquire(page);
                                // A kernel, which uses the page when its turn comes.
                                add(&current, [=] { return std::memset(frame, value, kPage) != nullptr; });
                                pool.release(page, true);
                                break;
                            } catch (const std::runtime_error&) {
                                ++faults;
                                fail_synchronize = -1;
                            }
                        }
                    }
                }
                for (int64_t page = 0; page < kPages; ++page) {
                    char bytes[kPage] = {};
                    for (int attempt = 0;; ++attempt) {
                        require(attempt < 4, "a fault that is over still fails");
                        try {
                            pool.read(page, 0, kPage, bytes);
                            break;
                        } catch (const std::runtime_error&) {
                            ++faults;
                            fail_synchronize = -1;
                        }
                    }
                    require(bytes[0] == 20 + page && bytes[kPage - 1] == 20 + page,
                            "a page is not what was written");
                }
            }
            require(events.empty(), "an event leaks");
            require(device == 3, "the caller's device is another one");
        }
    }
    run_out_of_memory();
    require(together > 100, "copies hardly ever go both ways at a time");
    require(faults > 40, "hardly anything failed");
    require(switched > 0, "the store never went to its device");
    std::printf("whole\n");
}
