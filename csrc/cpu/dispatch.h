// One table of entry points per instruction set; every kernel file is compiled once for each of them, in its own namespace.
#pragma once

#include <cstddef>

#include "../params.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 11
#define PYEMBED_WITH_AMX
#endif

namespace pyembed {

struct bf16 {
    uint16_t bits;  // the upper half of a float32
};

struct Kernels {
    const char* isa;
    void (*embed)(const EmbedParams&);
    void (*norm)(const NormRowsParams&);
    void (*rope)(const RopeParams&);
    void (*attention)(const AttentionParams&);
    void (*activation)(const ActivationParams&);
    void (*pool)(const PoolParams&);
    void (*linear)(const LinearParams&);
};

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_vnni_kernels;
extern const Kernels avx512_bf16_kernels;
#endif
#ifdef PYEMBED_WITH_AMX
extern const Kernels amx_kernels;
#endif

// Scratch memory of the calling thread, 64-byte aligned, kept for its next call. A second call may move the first one's memory.
float* scratch(size_t floats);

// Each kernel says which variant it is when it runs, so that a test can tell a forced variant from a silent fallback.
void ran(const char* isa);

}  // namespace pyembed
