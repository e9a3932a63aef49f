// What Python sees. Arguments are addresses and sizes, checked by worker.kernels.cpu; nothing here keeps a tensor alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "linear.h"
#include "machine_limits.h"
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

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Kernels may take long enough for other Python threads to want the lock.
using Unlocked = py::call_guard<py::gil_scoped_release>;

void def_linear(py::module_& module) {
    using qwire::Format;
    module.def("packed_bytes",
               [](int format, int64_t out, int64_t in) { return qwire::packed_bytes(Format(format), out, in); });
    module.def(
        "pack_floats",
        [](int format, uintptr_t packed, int64_t in, int64_t first, int64_t count, int source, uintptr_t rows) {
            qwire::pack_floats(Format(format), pointer(packed), in, first, count, Format(source), pointer(rows));
        },
        Unlocked());
    module.def(
        "pack_int8",
        [](uintptr_t packed, int64_t in, int64_t first, int64_t count, uintptr_t q, uintptr_t scale) {
            qwire::pack_int8(pointer(packed), in, first, count, pointer<int8_t>(q), pointer<uint16_t>(scale));
        },
        Unlocked());
    module.def(
        "pack_int4",
        [](uintptr_t packed, int64_t in, int64_t first, int64_t count, uintptr_t q, uintptr_t scale, uintptr_t zero) {
            qwire::pack_int4(pointer(packed), in, first, count, pointer<uint8_t>(q), pointer<uint16_t>(scale),
                             pointer<uint8_t>(zero));
        },
        Unlocked());
    module.def(
        "linear",
        [](int format, uintptr_t packed, int64_t out, int64_t in, uintptr_t bias, int64_t rows, uintptr_t x,
           int64_t x_stride, uintptr_t y, int64_t y_stride) {
            qwire::linear(Format(format), pointer(packed), out, in, pointer<float>(bias), rows, pointer<float>(x),
                          x_stride, pointer<float>(y), y_stride);
        },
        Unlocked());
    module.def(
        "quantize_rows",
        [](uintptr_t memory, int64_t rows, int64_t size, uintptr_t x, int64_t x_stride) {
            qwire::quantize_rows({pointer(memory), rows, size}, pointer<float>(x), x_stride);
        },
        Unlocked());
    module.def("quantized_rows_bytes", &qwire::QuantizedRows::bytes);
    module.def(
        "linear_quantized",
        [](int format, uintptr_t packed, int64_t out, int64_t in, uintptr_t bias, int64_t rows, uintptr_t memory,
           uintptr_t y, int64_t y_stride) {
            qwire::linear(Format(format), pointer(packed), out, pointer<float>(bias), {pointer(memory), rows, in},
                          pointer<float>(y), y_stride);
        },
        Unlocked());
    module.def(
        "embed",
        [](int format, uintptr_t packed, int64_t out, int64_t in, int64_t count, uintptr_t ids, uintptr_t y) {
            qwire::embed(Format(format), pointer(packed), out, in, count, pointer<int64_t>(ids), pointer<float>(y));
        },
        Unlocked());
}

}  // namespace

PYBIND11_MODULE(QWIRE_MODULE, module) {
    module.def("set_threads", &set_threads, py::arg("threads"), py::arg("cpus"));
    module.def("instruction_sets", &instruction_sets);
    module.def("num_threads", &qwire::num_threads);
    module.def("measure_read_bandwidth", &qwire::measure_read_bandwidth, py::arg("seconds"), Unlocked());
    module.def("measure_fma", &qwire::measure_fma, py::arg("seconds"), Unlocked());
    module.def("measure_int8", &qwire::measure_int8, py::arg("seconds"), Unlocked());
    def_linear(module);
}
