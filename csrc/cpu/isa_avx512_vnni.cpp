// The kernels for AVX-512 with VNNI: int8 is multiplied in fours, all else is as in isa_avx512.cpp. The pragma stays in force to the end of
// the file: templates are instantiated there.
#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace pyembed {
namespace avx512_vnni {
constexpr const char* ISA = "avx512_vnni";
#define PYEMBED_VNNI
#include "vec_avx512.h"

#include "kernels.h"
}  // namespace avx512_vnni
const Kernels avx512_vnni_kernels = avx512_vnni::kernels;
}  // namespace pyembed
#endif
