// The kernels for AVX2 and FMA. The pragma stays in force to the end of the file: templates are instantiated there.
#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma")
namespace pyembed {
namespace avx2 {
constexpr const char* ISA = "avx2";
#include "vec_avx2.h"

#include "kernels.h"
}  // namespace avx2
const Kernels avx2_kernels = avx2::kernels;
}  // namespace pyembed
#endif
