// State of one rule in a pool of pages: where the state of each parameter is, and the step over it, page by page.
//
// A parameter's state begins at a block of 256 elements. A page holds a fixed number of blocks, the planes of the rule
// one after another.
#pragma once

#include <functional>
#include <memory>

#include "optim/arguments.h"
#include "optim/pool.h"

namespace peftcore {
namespace optim {

// Updates segments, all of them of one step. A thread takes at least `blocks_per_task` blocks.
constexpr int64_t kBlocksPerTask = 64;
using Update =
    std::function<void(const Step& step, const std::vector<Segment>& segments, int64_t blocks_per_task)>;

class PagedState {
 public:
    PagedState(std::string_view rule, std::unique_ptr<Store> store, int64_t page_bytes, int64_t budget);

    // Allocates state of zeros for a parameter of `elements` elements and returns its slot. Throws std::runtime_error,
    // with nothing changed, if the store is full.
    int64_t allocate(int64_t elements);
    void clear(int64_t slot);
    // Copies a plane of a slot, in whole blocks, from or to ordinary memory. Throws std::invalid_argument unless the memory
    // has exactly the plane's `bytes`.
    void read(int64_t slot, int64_t plane, void* to, int64_t bytes);
    void write(int64_t slot, int64_t plane, const void* from, int64_t bytes);

    // One step of the parameters with state in `slots`. Sweeps alternate between forward and backward; a sweep that is
    // repeated with the same number, because a transfer failed, continues where it stopped.
    void step(const Step& step, at::IntArrayRef slots, int64_t sweep, const Update& update, const char* op);

    Pool pool;

 private:
    struct Slot {
        int64_t first_block, elements;
        int64_t call = -1;  // the last one that updated it
    };
    struct Part {  // of a segment, in one page; addresses of its state are offsets in the page
        int64_t page;
        Segment segment;
    };

    std::vector<Part> parts_by_page(const Step& step, at::IntArrayRef slots, const char* op);
    void check_size(int64_t slot, int64_t plane, int64_t bytes);
    template <typename Copy>
    void for_each_page(int64_t slot, int64_t plane, Copy copy);

    const RuleEntry& rule_;
    const int64_t page_blocks_;
    std::vector<int64_t> plane_offsets_;  // in a page
    std::vector<Slot> slots_;
    int64_t calls_ = 0;
};

// Finds paged state by its number, for operators.
int64_t register_state(const std::shared_ptr<PagedState>& state);
std::shared_ptr<PagedState> state_of(int64_t number, const char* op);

}  // namespace optim
}  // namespace peftcore
