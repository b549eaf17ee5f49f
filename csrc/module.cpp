// Python module peftcore._C: build facts and the SIMD level. Loading it registers the kernels of the operators,
// whose schemas are in peftcore/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "build_facts.h"
#include "common/caches.h"
#include "common/huge_pages.h"
#include "common/workspace.h"
#include "cpu/kernels.h"
#include "gradients.h"
#include "optim/python.h"

namespace py = pybind11;

namespace peftcore {
namespace {

std::vector<std::string> split(const std::string& list) {
    std::vector<std::string> parts;
    std::istringstream stream(list);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

py::dict facts() {
    const BuildFacts built = build_facts();
    py::dict result;
    result["version"] = built.version;
    result["commit"] = built.commit;
    result["compiler"] = built.compiler;
    result["torch"] = built.torch;
    result["cuda_compiler"] = built.cuda_compiler;
    result["cuda_architectures"] = split(built.cuda_architectures);
    result["cpu_levels"] = split(built.cpu_levels);
    return result;
}

std::optional<Dtype> dtype_of(const std::string& name) {
    if (name == "torch.float32") return Dtype::kFloat;
    if (name == "torch.float16") return Dtype::kHalf;
    if (name == "torch.bfloat16") return Dtype::kBFloat16;
    return {};
}

bool beats_library(const std::string& dtype) {
    const std::optional<Dtype> supported = dtype_of(dtype);
    return supported && cpu_kernels().many_rows[int(*supported)].beats_library;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() =
        "peftcore's compiled extension: build facts, SIMD level, and the operators' CPU and CUDA kernels";
    m.def("build_facts", &facts, "What this binary was built from and with.");
    m.def("cpu_levels", &cpu_levels, "SIMD levels of this build that this CPU can run, lowest first.");
    m.def("cpu_level", [] { return cpu_kernels().level; }, "The SIMD level in use.");
    m.def("set_cpu_level", &set_cpu_level, py::arg("name"),
          "Use another SIMD level; ValueError if it is not among cpu_levels().");
    m.def("beats_library", &beats_library, py::arg("dtype"),
          "Whether dense_linear multiplies a dtype, by PyTorch's name of it, faster than PyTorch at this "
          "level.");
    m.def(
        "has_cross_entropy",
        [](const std::string& dtype) {
            const std::optional<Dtype> supported = dtype_of(dtype);
            return supported && cpu_kernels().many_rows[int(*supported)].kernel.by_rows;
        },
        py::arg("dtype"),
        "Whether linear_cross_entropy_rows has a kernel for a dtype, by PyTorch's name of it, at this "
        "level.");
    m.def(
        "has_attention",
        [](const std::string& dtype) {
            const std::optional<Dtype> supported = dtype_of(dtype);
            return supported && cpu_kernels().attention[int(*supported)].forward != nullptr;
        },
        py::arg("dtype"),
        "Whether attention has a kernel for a dtype, by PyTorch's name of it, at this level.");
    m.def(
        "caches", [] { return std::make_tuple(caches().first, caches().second, caches().third); },
        "Sizes of the first, second and third cache in bytes, by which work is divided.");
    m.def(
        "set_caches",
        [](int64_t first, int64_t second, int64_t third) { set_caches({first, second, third}); },
        py::arg("first"), py::arg("second"), py::arg("third"), "Divide work for other caches: for tests.");
    m.def(
        "move_into_huge_pages",
        [](uintptr_t address, int64_t bytes) {
            move_into_huge_pages(reinterpret_cast<void*>(address), bytes);
        },
        py::arg("address"), py::arg("bytes"), "Ask the system to move memory into huge pages, in place.");
    m.def("refuse_gradients", &refuse_gradients, py::arg("name"),
          "Give an operator the kernel for autograd that raises a RuntimeError where a gradient would be "
          "lost.");
    m.def("free_workspace", &free_workspace, "Give back what this thread keeps for linear_4bit on CPU.");
    optim::bind_optim(m);
}

}  // namespace peftcore
