// The table of rules, and paged state as Python sees it: for the host (a file) or a CUDA device (pinned
// memory).
#include "optim/python.h"

#include <pybind11/stl.h>

#include "optim/file_store.h"
#include "optim/paged_state.h"

namespace py = pybind11;

namespace peftcore {
namespace optim {

// Defined by optim/cuda/ops.cpp where CUDA was compiled.
__attribute__((weak)) std::unique_ptr<Store> make_cuda_store(int device, int64_t page_bytes);

namespace {

struct PagedStateHandle {
    std::shared_ptr<PagedState> state;
    int64_t number;

    PagedStateHandle(const std::string& rule, int64_t page_bytes, int64_t budget,
                     const std::string& directory, int device) {
        if (page_bytes <= 0 || page_bytes % 4096 != 0)
            throw py::value_error("page_bytes must be a multiple of 4096, found " +
                                  std::to_string(page_bytes));
        if (device >= 0 && make_cuda_store == nullptr)
            throw std::runtime_error("the extension was built without CUDA; paging on a card needs it");
        state = std::make_shared<PagedState>(
            rule, device < 0 ? make_file_store(directory, page_bytes) : make_cuda_store(device, page_bytes),
            page_bytes, budget);
        number = register_state(state);
    }

    Pool& pool() const { return state->pool; }
};

void define_rule_from_python(const std::string& name,
                             const std::vector<std::pair<std::string, int64_t>>& planes,
                             const std::string& scalars) {
    std::vector<Plane> table;
    for (const auto& [dtype, elements] : planes)
        table.push_back({c10::getStringToDtypeMap().at(dtype), elements});
    define_rule(name, table, scalars);
}

}  // namespace

void bind_optim(py::module_& m) {
    using Handle = PagedStateHandle;
    using free = py::call_guard<py::gil_scoped_release>;
    m.def("define_optim_rule", &define_rule_from_python, py::arg("name"), py::arg("planes"),
          py::arg("scalars"));
    py::class_<Handle>(m, "PagedState",
                       "State of one rule in pages, a budget of them resident (csrc/optim/paged_state.h).")
        .def(py::init<const std::string&, int64_t, int64_t, const std::string&, int>(), py::arg("rule"),
             py::arg("page_bytes"), py::arg("budget"), py::arg("directory"), py::arg("device") = -1)
        .def_readonly("number", &Handle::number, "What the operators call it.")
        .def_property_readonly("budget", [](const Handle& h) { return h.pool().budget(); })
        .def_property_readonly("pages", [](const Handle& h) { return h.pool().pages(); })
        .def_property_readonly("resident_bytes", [](const Handle& h) { return h.pool().resident_bytes(); })
        .def_property_readonly("peak_bytes", [](const Handle& h) { return h.pool().peak_bytes; })
        .def_property_readonly("bytes_in", [](const Handle& h) { return h.pool().bytes_in; })
        .def_property_readonly("bytes_out", [](const Handle& h) { return h.pool().bytes_out; })
        .def_property_readonly("seconds_waiting", [](const Handle& h) { return h.pool().seconds_waiting; })
        .def(
            "allocate", [](Handle& h, int64_t elements) { return h.state->allocate(elements); }, free())
        .def(
            "clear", [](Handle& h, int64_t slot) { h.state->clear(slot); }, free())
        .def(
            "read",
            [](Handle& h, int64_t slot, int64_t plane, uintptr_t to, int64_t bytes) {
                h.state->read(slot, plane, reinterpret_cast<void*>(to), bytes);
            },
            free())
        .def(
            "write",
            [](Handle& h, int64_t slot, int64_t plane, uintptr_t from, int64_t bytes) {
                h.state->write(slot, plane, reinterpret_cast<const void*>(from), bytes);
            },
            free())
        .def(
            "resize", [](Handle& h, int64_t budget) { h.pool().resize(budget); }, free())
        .def(
            "balance", [](Handle& h, int64_t margin) { h.pool().balance(margin); }, free())
        .def("evict", [](Handle& h) { h.pool().evict(); }, free());
}

}  // namespace optim
}  // namespace peftcore
