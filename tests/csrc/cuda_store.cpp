// The page store of a card over a runtime of the test's, any call of which can fail: built with
// csrc/optim/pool.cpp and run by test_cuda_store.py. Nothing here needs CUDA or PyTorch.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "optim/cuda/store.h"
#include "optim/pool.h"

namespace {

int device = 3, switched = 0;  // the caller's device; how often it was left
long fail_record = -1, fail_copy = -1, fail_synchronize = -1, records = 0, copies = 0, synchronizes = 0;
std::set<void*> events;

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

void here() { require(device == 7, "a runtime call on another device than the store's"); }

}  // namespace

extern "C" {

const char* peftcore_cuda_alloc(int64_t bytes, void** memory) {
    here();
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
    *stream = nullptr;
    return nullptr;
}
void peftcore_cuda_delete_stream(void*) {}
const char* peftcore_cuda_record(void*, void** event) {
    here();
    *event = nullptr;
    if (const char* error = failing(records, fail_record)) return error;
    *event = std::malloc(1);
    events.insert(*event);
    return nullptr;
}
void peftcore_cuda_delete_event(void* event) {
    require(events.erase(event) == 1, "an event that was never recorded is deleted");
    std::free(event);
}
const char* peftcore_cuda_wait_event(void*, void* event) {
    here();
    require(events.count(event) == 1, "an event that was never recorded is waited for");
    return nullptr;
}
const char* peftcore_cuda_synchronize(void*) {
    here();
    return failing(synchronizes, fail_synchronize);
}
const char* peftcore_cuda_copy(void* to, const void* from, int64_t bytes, void*) {
    here();
    if (const char* error = failing(copies, fail_copy)) return error;
    std::memcpy(to, from, size_t(bytes));
    return nullptr;
}
const char* peftcore_cuda_zero(void* memory, int64_t bytes, void*) {
    here();
    std::memset(memory, 0, size_t(bytes));
    return nullptr;
}
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
                Pool pool(std::make_unique<CudaStore<On>>(7, kPage, [](int) -> void* { return nullptr; }),
                          kPage, 2 * kPage);
                pool.grow(kPages);
                if (kind == 0) fail_record = at;
                if (kind == 1) fail_copy = at;
                if (kind == 2)
                    fail_record = at, fail_synchronize = 1;  // the one that stands in for the event
                for (int round = 0; round < 2; ++round) {
                    for (int64_t page = 0; page < kPages; ++page) {
                        char bytes[kPage];
                        std::memset(bytes, int(10 * (round + 1) + page), kPage);
                        for (int attempt = 0;; ++attempt) {
                            require(attempt < 4, "a fault that is over still fails");
                            try {
                                pool.write(page, 0, kPage, bytes);
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
    require(faults > 40, "hardly anything failed");
    require(switched > 0, "the store never went to its device");
    std::printf("whole\n");
}
