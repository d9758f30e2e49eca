// The kernels for AVX-512 with VNNI and BF16: bfloat16 is multiplied in pairs, int8 in fours, all else is as in isa_avx512.cpp. The pragma
// stays in force to the end of the file: templates are instantiated there.
#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace pyembed {
namespace avx512_bf16 {
constexpr const char* ISA = "avx512_bf16";
#define PYEMBED_VNNI
#define PYEMBED_PAIRS
#include "vec_avx512.h"

#include "kernels.h"
}  // namespace avx512_bf16
const Kernels avx512_bf16_kernels = avx512_bf16::kernels;
}  // namespace pyembed
#endif
