#include "common/workspace.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "common/integers.h"

namespace peftcore {
namespace {

constexpr int64_t kAlignment = 64;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

struct Workspace {
    std::unique_ptr<void, Free> memory;
    int64_t bytes = 0;
};

thread_local Workspace thread_workspace;

}  // namespace

void* workspace(int64_t bytes) {
    if (bytes > thread_workspace.bytes) {
        free_workspace();
        const int64_t rounded = filled_up(bytes, kAlignment);
        void* memory = std::aligned_alloc(size_t(kAlignment), size_t(rounded));
        if (memory == nullptr) throw std::bad_alloc();
        thread_workspace.memory.reset(memory);
        thread_workspace.bytes = rounded;
    }
    return thread_workspace.memory.get();
}

void free_workspace() { thread_workspace = {}; }

}  // namespace peftcore
