// PagePool, as Python sees it: made for the host (a file) or a CUDA device (pinned host memory).
#include "optim/python.h"

#include "optim/file_store.h"
#include "optim/paged.h"

namespace py = pybind11;

namespace peftcore {
namespace optim {

// Defined by optim/binding.cpp where CUDA was compiled.
__attribute__((weak)) std::unique_ptr<Store> make_cuda_store(int device, int64_t page_bytes);

namespace {

struct PagePool {
    std::shared_ptr<Pool> pool;
    int64_t number;

    PagePool(int64_t page_bytes, int64_t budget, const std::string& directory, int device) {
        if (page_bytes <= 0 || page_bytes % 4096 != 0)
            throw py::value_error("page_bytes must be a multiple of 4096, found " +
                                  std::to_string(page_bytes));
        if (device >= 0 && make_cuda_store == nullptr)
            throw std::runtime_error("the extension was built without CUDA; paging on a card needs it");
        pool = std::make_shared<Pool>(
            device < 0 ? make_file_store(directory, page_bytes) : make_cuda_store(device, page_bytes),
            page_bytes, budget);
        number = register_pool(pool);
    }
};

}  // namespace

void bind_pool(py::module_& m) {
    using free = py::call_guard<py::gil_scoped_release>;
    py::class_<PagePool>(m, "PagePool",
                         "Pages of optimizer state, a budget of them resident (csrc/optim/pool.h).")
        .def(py::init<int64_t, int64_t, const std::string&, int>(), py::arg("page_bytes"), py::arg("budget"),
             py::arg("directory"), py::arg("device") = -1)
        .def_readonly("number", &PagePool::number, "What the operators call it.")
        .def_property_readonly("budget", [](const PagePool& p) { return p.pool->budget(); })
        .def_property_readonly("pages", [](const PagePool& p) { return p.pool->pages(); })
        .def_property_readonly("resident_bytes", [](const PagePool& p) { return p.pool->resident_bytes(); })
        .def_property_readonly("peak_bytes", [](const PagePool& p) { return p.pool->peak_bytes; })
        .def_property_readonly("bytes_in", [](const PagePool& p) { return p.pool->bytes_in; })
        .def_property_readonly("bytes_out", [](const PagePool& p) { return p.pool->bytes_out; })
        .def_property_readonly("seconds_waiting", [](const PagePool& p) { return p.pool->seconds_waiting; })
        .def(
            "grow", [](PagePool& p, int64_t pages) { p.pool->grow(pages); }, free())
        .def(
            "resize", [](PagePool& p, int64_t budget) { p.pool->resize(budget); }, free())
        .def(
            "balance", [](PagePool& p, int64_t margin) { p.pool->balance(margin); }, free())
        .def(
            "evict", [](PagePool& p) { p.pool->evict(); }, free())
        .def(
            "read",
            [](PagePool& p, int64_t page, int64_t offset, int64_t bytes, uintptr_t to) {
                p.pool->read(page, offset, bytes, reinterpret_cast<void*>(to));
            },
            free())
        .def(
            "write",
            [](PagePool& p, int64_t page, int64_t offset, int64_t bytes, uintptr_t from) {
                p.pool->write(page, offset, bytes, reinterpret_cast<const void*>(from));
            },
            free());
}

}  // namespace optim
}  // namespace peftcore
