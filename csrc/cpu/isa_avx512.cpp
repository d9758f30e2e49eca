// The kernels for AVX-512 F, BW, DQ and VL. The pragma stays in force to the end of the file: templates are instantiated there.
#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace pyembed {
namespace avx512 {
constexpr const char* ISA = "avx512";
#include "vec_avx512.h"

#include "kernels.h"
}  // namespace avx512
const Kernels avx512_kernels = avx512::kernels;
}  // namespace pyembed
#endif
