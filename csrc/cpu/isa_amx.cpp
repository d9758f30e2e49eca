// The kernels for CPUs with AMX: linear layers multiply in its registers, all else is as in isa_avx512_bf16.cpp. The pragma stays in force
// to the end of the file: templates are instantiated there.
#include "dispatch.h"

#ifdef PYEMBED_WITH_AMX
#include <immintrin.h>

#pragma GCC target("amx-tile,amx-bf16,amx-int8,avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace pyembed {
namespace amx {
constexpr const char* ISA = "amx";
#define PYEMBED_VNNI
#define PYEMBED_PAIRS
#define PYEMBED_AMX
#include "vec_avx512.h"

#include "kernels.h"
}  // namespace amx
const Kernels amx_kernels = amx::kernels;
}  // namespace pyembed
#endif
