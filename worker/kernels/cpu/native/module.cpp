// What Python sees. Arguments are addresses and sizes, checked by worker.kernels.cpu; nothing here keeps a tensor alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "machine_limits.h"
#include "pages.h"
#include "pool.h"
#include "rows.h"
#include "select.h"
#include "stored.h"

namespace py = pybind11;

namespace {

void set_threads(int threads, const std::vector<int>& cpus) {
    if (threads < 1) throw py::value_error("threads: must be at least 1");
    if (!cpus.empty() && int(cpus.size()) != threads) throw py::value_error("cpus: one a thread, or none");
    qwire::set_threads(threads, cpus.empty() ? nullptr : cpus.data());
}

#if defined(__x86_64__)
// Whether there is AMX for bytes and the system lets this process use it, which has to be asked for once.
bool amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bit_AMX_TILE) || !(d & bit_AMX_INT8)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, from Linux 5.16 on
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// The instruction sets of setup.py that this machine and its system have, best first.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni && amx()) names.emplace_back("avx512_amx");
    if (vnni) names.emplace_back("avx512_vnni");
    if (avx512) names.emplace_back("avx512");
    if (avx2) names.emplace_back("avx2");
#endif
    names.emplace_back("portable");
    return names;
}

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Kernel calls of one thread, to be made again with the same arguments: what they read has changed by then.
class Program {
   public:
    // Calls that this thread makes from here on go into the program, until `stop`.
    void record() { recorded_ = this; }
    static void stop() { recorded_ = nullptr; }

    void run() const {
        const py::gil_scoped_release unlocked;
        size_t next = 0;  // the first call after the one at hand that reads weights
        for (size_t i = 0; i < calls_.size(); ++i) {
            while (next < calls_.size() && (next <= i || !calls_[next].weights.data)) ++next;
            qwire::expect(next < calls_.size() ? calls_[next].weights : qwire::Pieces{});
            calls_[i].make();
        }
    }

    size_t size() const { return calls_.size(); }
    // Whether nothing was called meanwhile that programs don't take.
    bool complete() const { return complete_; }

    // Says that a call is made which the program won't have.
    static void leave_out() {
        if (recorded_) recorded_->complete_ = false;
    }

    // Makes a call, without the lock of Python, and records it where that is wanted.
    template <class F>
    static void make(F call, const qwire::Pieces& weights = {}) {
        const py::gil_scoped_release unlocked;
        call();
        if (recorded_) recorded_->calls_.push_back({std::move(call), weights});
    }

   private:
    struct Call {
        std::function<void()> make;
        qwire::Pieces weights;  // that it reads, to be fetched before by threads that wait
    };
    std::vector<Call> calls_;
    bool complete_ = true;
    static thread_local Program* recorded_;
};

thread_local Program* Program::recorded_ = nullptr;

void paged_attention(Address queries, int64_t query_stride, int64_t q_heads, Address keys, Address values,
                     Address key_scales, Address value_scales, int kv_type, int64_t kv_heads, int64_t blocks,
                     int64_t block_size, int64_t head_dim, Address starts, Address lengths, Address tables,
                     Address table_starts, int64_t chunks, int64_t window, Address out) {
    Program::make([=] {
        qwire::paged_attention(
            at<const float>(queries), query_stride, q_heads,
            {at<const void>(keys), at<const void>(values), at<const float>(key_scales), at<const float>(value_scales),
             qwire::KvType(kv_type), kv_heads, blocks, block_size, head_dim},
            {at<const int64_t>(starts), at<const int64_t>(lengths), at<const int64_t>(tables),
             at<const int64_t>(table_starts), chunks},
            window, at<float>(out));
    });
}

void rms_norm(Address x, Address residual, Address weight, float eps, Address out, Address sums, int64_t rows,
              int64_t size) {
    Program::make([=] {
        qwire::rms_norm(at<const float>(x), at<const float>(residual), at<const float>(weight), eps, at<float>(out),
                        at<float>(sums), rows, size);
    });
}

void rope_and_cache(Address qkv, Address cos, Address sin, Address q_norm, Address k_norm, float eps, Address slots,
                    int64_t rows, int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                    int64_t slots_a_head, Address keys, Address values, Address key_scales, Address value_scales,
                    int kv_type, Address out) {
    Program::make([=] {
        qwire::rope_and_cache({at<const float>(qkv), at<const float>(cos), at<const float>(sin),
                               at<const float>(q_norm), at<const float>(k_norm), eps, at<const int64_t>(slots), rows,
                               tokens, q_heads, kv_heads, head_dim, slots_a_head, at<void>(keys), at<void>(values),
                               at<float>(key_scales), at<float>(value_scales), qwire::KvType(kv_type),
                               at<float>(out)});
    });
}

void argmax(Address logits, int64_t rows, int64_t size, Address ids) {
    Program::leave_out();
    const py::gil_scoped_release unlocked;
    qwire::argmax(at<const float>(logits), rows, size, at<int64_t>(ids));
}

void top_values(Address logits, int64_t rows, int64_t size, int64_t k, Address values, Address ids) {
    Program::leave_out();
    const py::gil_scoped_release unlocked;
    qwire::top_values(at<const float>(logits), rows, size, k, at<float>(values), at<int64_t>(ids));
}

void total_mass(Address logits, Address peaks, int64_t rows, int64_t size, Address masses) {
    Program::leave_out();
    const py::gil_scoped_release unlocked;
    qwire::total_mass(at<const float>(logits), at<const float>(peaks), rows, size, at<double>(masses));
}

void divide_rows(Address logits, int64_t size, Address chosen, Address divisors, int64_t count) {
    Program::leave_out();
    const py::gil_scoped_release unlocked;
    qwire::divide_rows(at<float>(logits), size, at<const int64_t>(chosen), at<const float>(divisors), count);
}

void philox_words(Address ids, Address rows, int64_t count, Address positions, Address choices, Address seeds,
                  Address words) {
    Program::leave_out();
    const py::gil_scoped_release unlocked;
    qwire::philox_words(at<const int64_t>(ids), at<const int64_t>(rows), count, at<const int64_t>(positions),
                        at<const int64_t>(choices), at<const uint64_t>(seeds), at<int64_t>(words));
}

// Format, packed weight, input features, first row, rows, format of stored floats, and each tensor's file and offset.
using PartOfFile = std::tuple<int, Address, int64_t, int64_t, int64_t, int, std::vector<std::pair<int, int64_t>>>;

std::optional<std::tuple<int64_t, int64_t, int>> pack_stored(const std::vector<PartOfFile>& given) {
    const py::gil_scoped_release unlocked;
    std::vector<qwire::StoredPart> parts;
    for (const auto& [format, packed, in, first, count, source, tensors] : given) {
        parts.push_back({qwire::Format(format), at(packed), in, first, count, qwire::Format(source), {}});
        for (const auto& [file, offset] : tensors) parts.back().tensors.push_back({file, offset});
    }
    const auto failure = qwire::pack_stored(parts);
    if (!failure) return std::nullopt;
    return std::tuple(failure->part, failure->tensor, failure->error);
}

// Kernels may take long enough for other Python threads to want the lock.
using Unlocked = py::call_guard<py::gil_scoped_release>;

void def_linear(py::module_& module) {
    using qwire::Format;
    module.def("packed_bytes",
               [](int format, int64_t out, int64_t in) { return qwire::packed_bytes(Format(format), out, in); });
    module.def(
        "pack_floats",
        [](int format, Address packed, int64_t in, int64_t first, int64_t count, int source, Address rows) {
            qwire::pack_floats(Format(format), at(packed), in, first, count, Format(source), at(rows));
        },
        Unlocked());
    module.def(
        "pack_int8",
        [](Address packed, int64_t in, int64_t first, int64_t count, Address q, Address scale) {
            qwire::pack_int8(at(packed), in, first, count, at<int8_t>(q), at<uint16_t>(scale));
        },
        Unlocked());
    module.def(
        "pack_int4",
        [](Address packed, int64_t in, int64_t first, int64_t count, Address q, Address scale, Address zero) {
            qwire::pack_int4(at(packed), in, first, count, at<uint8_t>(q), at<uint16_t>(scale),
                             at<uint8_t>(zero));
        },
        Unlocked());
    module.def("pack_stored", &pack_stored);
    module.def("gather_pages", [](Address from, int64_t bytes) { return qwire::gather_pages(at(from), bytes); },
               Unlocked());
    module.def("populate", [](Address from, int64_t bytes) { qwire::populate(at<char>(from), bytes); }, Unlocked());
    module.def(
        "linear",
        [](int format, Address packed, int64_t out, int64_t in, Address bias, int64_t rows, Address x,
           int64_t x_stride, bool gated, Address y, int64_t y_stride) {
            Program::make(
                [=] {
                    qwire::linear(Format(format), at(packed), out, in, at<float>(bias), rows,
                                  {at<float>(x), x_stride, gated}, at<float>(y), y_stride);
                },
                qwire::panels(Format(format), at(packed), out, in));
        });
    module.def(
        "embed",
        [](int format, Address packed, int64_t out, int64_t in, int64_t count, Address ids, Address y) {
            Program::make(
                [=] { qwire::embed(Format(format), at(packed), out, in, count, at<int64_t>(ids), at<float>(y)); });
        });
}

}  // namespace

PYBIND11_MODULE(QWIRE_MODULE, module) {
    module.def("set_threads", &set_threads, py::arg("threads"), py::arg("cpus"));
    module.attr("fixed_point") = qwire::kFixedPoint;
    module.attr("fixed_products") = qwire::kFixedProducts;
    module.def("instruction_sets", &instruction_sets);
    module.def("num_threads", &qwire::num_threads);
    // Local: there is a class of this name for every instruction set.
    py::class_<Program>(module, "Program", py::module_local())
        .def(py::init<>())
        .def("record", &Program::record)
        .def_static("stop", &Program::stop)
        .def("run", &Program::run)
        .def_property_readonly("complete", &Program::complete)
        .def("__len__", &Program::size);
    module.def("paged_attention", &paged_attention);
    module.def("rms_norm", &rms_norm);
    module.def("rope_and_cache", &rope_and_cache);
    module.def("argmax", &argmax);
    module.def("top_values", &top_values);
    module.def("total_mass", &total_mass);
    module.def("divide_rows", &divide_rows);
    module.def("philox_words", &philox_words);
    module.def("measure_read_bandwidth", &qwire::measure_read_bandwidth, py::arg("seconds"), Unlocked());
    module.def("measure_fma", &qwire::measure_fma, py::arg("seconds"), Unlocked());
    module.def("measure_int8", &qwire::measure_int8, py::arg("seconds"), Unlocked());
    def_linear(module);
}
