// What Python sees. Arguments are addresses and sizes, checked by worker.kernels.cpu; nothing here keeps a tensor alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "pool.h"

namespace py = pybind11;

namespace {

void set_threads(int threads, const std::vector<int>& cpus) {
    if (threads < 1) throw py::value_error("threads: must be at least 1");
    if (!cpus.empty() && int(cpus.size()) != threads) throw py::value_error("cpus: one a thread, or none");
    qwire::set_threads(threads, cpus.empty() ? nullptr : cpus.data());
}

// The instruction sets of setup.py that this machine and its system have, best first.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        names.emplace_back("avx512_vnni");
    if (avx512) names.emplace_back("avx512");
    if (avx2) names.emplace_back("avx2");
#endif
    names.emplace_back("portable");
    return names;
}

}  // namespace

PYBIND11_MODULE(QWIRE_MODULE, module) {
    module.def("set_threads", &set_threads, py::arg("threads"), py::arg("cpus"));
    module.def("instruction_sets", &instruction_sets);
    module.def("num_threads", &qwire::num_threads);
}
