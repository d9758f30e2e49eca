// Chooses the instruction set once, and exposes the kernels to Python as functions of addresses, sizes and strides.
//
// The Python wrapper has checked dtypes, shapes and strides. What is checked here are indices inside tensors, which C++ can do at no
// cost worth naming: an id, an offset or a span out of range is a ValueError and never a read out of bounds.
#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <pybind11/pybind11.h>

#include "dispatch.h"

#ifdef PYEMBED_WITH_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;

namespace pyembed {
namespace {

struct Scratch {
    float* data = nullptr;
    size_t floats = 0;
    ~Scratch() { std::free(data); }
};
thread_local Scratch thread_scratch;

std::atomic<const char*> last_ran{""};

#ifdef PYEMBED_WITH_AMX
// Whether this CPU has AMX for bfloat16 and bytes, and the system lends this process its registers, for which a process has to ask.
bool amx() {
    unsigned a, b, c, d;
    constexpr unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
    constexpr long ask = 0x1023, registers = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask, registers) == 0;
}
#endif

// Supported variants, best first.
std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> all;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        const bool vnni = __builtin_cpu_supports("avx512vnni");
        const bool pairs = vnni && __builtin_cpu_supports("avx512bf16");
#ifdef PYEMBED_WITH_AMX
        if (pairs && amx()) all.push_back(&amx_kernels);
#endif
        if (pairs) all.push_back(&avx512_bf16_kernels);
        if (vnni) all.push_back(&avx512_vnni_kernels);
        all.push_back(&avx512_kernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&avx2_kernels);
#endif
    all.push_back(&generic_kernels);
    return all;
}

std::atomic<const Kernels*> chosen{supported().front()};

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels* each : supported()) names.push_back(each->isa);
    return names;
}

void force_isa(const std::string& name) {
    std::string known;
    for (const Kernels* each : supported()) {
        if (name == each->isa) {
            chosen = each;
            last_ran = "";
            return;
        }
        known += std::string(known.empty() ? "" : ", ") + each->isa;
    }
    throw std::invalid_argument("this CPU has no kernels for '" + name + "'; it has " + known);
}

using Address = uintptr_t;
template <class T>
const T* at(Address address) {
    return reinterpret_cast<const T*>(address);
}

[[noreturn]] void refuse(const char* what, const std::string& expected, int64_t got, int64_t index) {
    throw std::invalid_argument(what + (" " + expected) + ", got " + std::to_string(got) + " at index " + std::to_string(index));
}

void check_indices(const int64_t* index, int64_t count, int64_t limit, const char* what) {
    for (int64_t i = 0; i < count; ++i) {
        if (index[i] < 0 || index[i] >= limit) refuse(what, "must be in [0, " + std::to_string(limit) + ")", index[i], i);
    }
}

void check_offsets(const int32_t* offsets, int64_t sequences, int64_t rows, const char* what) {
    int32_t before = 0;
    for (int64_t n = 0; n <= sequences; ++n) {
        if (offsets[n] < before || offsets[n] > rows) {
            refuse(what, "must not decrease and must stay in [0, " + std::to_string(rows) + "]", offsets[n], n);
        }
        before = offsets[n];
    }
}

void check_schedule(const AttentionParams& p, int64_t sequences) {
    int64_t expected = 0;
    for (int64_t n = 0; n < sequences; ++n) expected += (p.cu_q[n + 1] - p.cu_q[n] + QUERY_TILE - 1) / QUERY_TILE;
    bool fits = expected == p.num_tiles;
    for (int64_t i = 0; fits && i < p.num_tiles; ++i) {
        const int64_t n = p.tiles[2 * i], tile = p.tiles[2 * i + 1];
        fits = n >= 0 && n < sequences && tile >= 0 && tile * QUERY_TILE < p.cu_q[n + 1] - p.cu_q[n];
    }
    if (!fits) throw std::invalid_argument("schedule must be made by schedule(lengths) from the lengths of the queries in cu_q");
}

NormParams norm_params(const py::object& norm) {
    if (norm.is_none()) return NormParams{nullptr, nullptr, 0.0f, false, false, false};
    const auto t = norm.cast<std::tuple<Address, Address, float, bool, bool>>();
    return NormParams{at<float>(std::get<0>(t)), at<float>(std::get<1>(t)), std::get<2>(t), std::get<3>(t), std::get<4>(t), true};
}

void embed(int dtype, int threads, Address ids, int64_t T, int64_t D, Address tokens, int64_t token_stride, int64_t V, float scale,
           Address positions, Address table, int64_t table_stride, int64_t table_rows, Address type_row, const py::object& norm,
           Address out) {
    const EmbedParams p{at<int64_t>(ids), T, D, at<void>(tokens), token_stride, scale, at<int64_t>(positions), at<void>(table),
                        table_stride, at<void>(type_row), norm_params(norm), (void*)out, Dtype(dtype), threads};
    py::gil_scoped_release release;
    check_indices(p.ids, T, V, "input_ids");
    if (p.position_table) check_indices(p.positions, T, table_rows, "positions");
    chosen.load()->embed(p);
}

void norm(int dtype, int threads, Address x, int64_t T, int64_t D, int64_t x_stride, Address residual, int64_t residual_stride,
          const py::object& norm, Address values, Address scale, int quant) {
    const NormRowsParams p{at<void>(x), T, D, x_stride, (void*)residual, residual_stride, norm_params(norm),
                           RowsOut{(void*)values, (float*)scale, Quant(quant)}, Dtype(dtype), threads};
    py::gil_scoped_release release;
    chosen.load()->norm(p);
}

void rope(int dtype, int threads, Address qkv, int64_t T, int64_t stride, int64_t H, int64_t G, int64_t K, Address cos, int64_t cos_stride,
          Address sin, int64_t sin_stride, int64_t R, int64_t table_rows, Address rows, bool interleaved, const py::object& q_norm,
          const py::object& k_norm) {
    const RopeParams p{(void*)qkv, T, stride, H, G, K, at<float>(cos), at<float>(sin), cos_stride, sin_stride, R, at<int64_t>(rows),
                       interleaved, norm_params(q_norm), norm_params(k_norm), Dtype(dtype), threads};
    py::gil_scoped_release release;
    if (p.cos) check_indices(p.rows, T, table_rows, "rows");
    chosen.load()->rope(p);
}

using Rows = std::tuple<Address, int64_t, int64_t>;  // address, token stride, head stride
HeadRows head_rows(const Rows& rows) { return HeadRows{at<void>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)}; }

void attention(int dtype, int threads, const Rows& q, const Rows& k, const Rows& v, int64_t Tq, int64_t Tk, int64_t H, int64_t G, int64_t K,
               int64_t N, Address cu_q, Address cu_k, Address tiles, int64_t num_tiles, bool causal, int64_t left, int64_t right,
               float scale, float softcap, Address bias, int64_t radius, const Rows& prefix_k, const Rows& prefix_v, int64_t P, int64_t M,
               Address cu_p, Address prefix_of, Address q_start, Address out) {
    const AttentionParams p{head_rows(q), head_rows(k), head_rows(v), H, G, K, at<int32_t>(cu_q), at<int32_t>(cu_k), at<int32_t>(tiles),
                            num_tiles, causal, left, right, scale, softcap, at<float>(bias), radius, head_rows(prefix_k),
                            head_rows(prefix_v), at<int32_t>(cu_p), at<int32_t>(prefix_of), at<int32_t>(q_start), (void*)out,
                            Dtype(dtype), threads};
    py::gil_scoped_release release;
    check_offsets(p.cu_q, N, Tq, "cu_q");
    check_offsets(p.cu_k, N, Tk, "cu_k");
    check_schedule(p, N);
    if (p.prefix_k.data) {
        check_offsets(p.cu_p, M, P, "cu_p");
        for (int64_t n = 0; n < N; ++n) {
            if (p.prefix_of[n] >= M) refuse("prefix_of", "must be below " + std::to_string(M), p.prefix_of[n], n);
        }
    }
    for (int64_t n = 0; p.q_start && n < N; ++n) {
        if (p.q_start[n] < 0 || p.q_start[n] > EXACT - Tq) refuse("q_start", "must be a position below 2^24", p.q_start[n], n);
    }
    chosen.load()->attention(p);
}

void activation(int dtype, int threads, int act, Address x, int64_t T, int64_t F, int64_t x_stride, Address values, Address scale,
                int quant) {
    const ActivationParams p{at<void>(x), T, F, x_stride, Act(act), RowsOut{(void*)values, (float*)scale, Quant(quant)}, Dtype(dtype),
                             threads};
    py::gil_scoped_release release;
    chosen.load()->activation(p);
}

void pool(int dtype, int threads, int mode, Address x, int64_t T, int64_t D, int64_t x_stride, Address cu_seqlens, Address spans, int64_t N,
          int64_t dim, const py::object& norm, bool normalize, Address out) {
    const PoolParams p{at<void>(x), D, x_stride, at<int32_t>(cu_seqlens), at<int32_t>(spans), N, dim, Pool(mode), norm_params(norm),
                       normalize, (float*)out, Dtype(dtype), threads};
    py::gil_scoped_release release;
    for (int64_t n = 0; n < N; ++n) {
        const int32_t first = p.spans[2 * n], end = p.spans[2 * n + 1];
        if (first < end && (first < 0 || end > T)) {
            throw std::invalid_argument("spans must lie in [0, " + std::to_string(T) + "], got (" + std::to_string(first) + ", " +
                                        std::to_string(end) + ") for text " + std::to_string(n));
        }
    }
    chosen.load()->pool(p);
}

Matrix matrix(const py::object& layer) {
    if (layer.is_none()) return Matrix{};
    const auto t = layer.cast<std::tuple<Address, int64_t, int64_t, int64_t, bool, Address, Address, Address, int>>();
    return Matrix{at<int32_t>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t),
                  at<float>(std::get<5>(t)),   at<int32_t>(std::get<6>(t)), at<float>(std::get<7>(t)), Act(std::get<8>(t))};
}

void linear(int threads, Address x, int64_t T, int64_t x_stride, const py::object& first, const py::object& second, Address residual,
            int64_t residual_stride, const py::object& norm, Address y) {
    const Matrix one = matrix(first), two = matrix(second);
    const int64_t out = two.words ? two.out : one.out;
    const NormRowsParams after{at<void>(y), T, out, out, (void*)residual, residual_stride, norm_params(norm),
                               RowsOut{(void*)y, nullptr, Quant::none}, Dtype::bf16, threads};
    const LinearParams p{at<void>(x), T, x_stride, one, two, after, (void*)y, threads};
    py::gil_scoped_release release;
    chosen.load()->linear(p);
}

}  // namespace

float* scratch(size_t floats) {
    Scratch& mine = thread_scratch;
    if (mine.floats < floats) {
        std::free(mine.data);
        mine.floats = 0;
        mine.data = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
        if (mine.data == nullptr) throw std::bad_alloc();
        mine.floats = floats;
    }
    return mine.data;
}

void ran(const char* isa) { last_ran = isa; }

}  // namespace pyembed

PYBIND11_MODULE(_cpu, m) {
    using namespace pyembed;
    m.doc() = "CPU kernels; pyembed.ops.cpu is their interface.";
    m.attr("QUERY_TILE") = QUERY_TILE;
    m.attr("EXACT") = EXACT;
    m.attr("PANEL") = PANEL;
    m.def("isas", [] {
        py::list names;
        for (const auto& name : isas()) names.append(name);
        return names;
    }, "Variants that this CPU can run, best first.");
    m.def("isa", [] { return chosen.load()->isa; }, "The variant that the next call runs.");
    m.def("last_isa", [] { return last_ran.load(); }, "The variant that ran last; empty if none has since force_isa.");
    m.def("force_isa", &force_isa, "Run another variant from now on, in every thread: for tests.");
    m.def("embed", &embed);
    m.def("norm", &norm);
    m.def("rope", &rope);
    m.def("attention", &attention);
    m.def("activation", &activation);
    m.def("pool", &pool);
    m.def("linear", &linear);
}
