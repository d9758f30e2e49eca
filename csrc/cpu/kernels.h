// All kernels for the instruction set whose vec_*.h was included before, and their table. Included once per instruction set, inside its
// namespace; no standard header may be included from here on, or its inline functions would be compiled for that instruction set and
// could be linked into everybody's.
#include "math.h"

#include "norm.h"

#include "singles.h"
#ifdef PYEMBED_PAIRS
#include "pairs.h"
#else
using Narrow = Singles<bf16>;  // how attention multiplies bfloat16
#endif

#include "activation.h"
#include "attention.h"
#include "embed.h"
#include "gemm.h"
#include "linear.h"
#include "pool.h"
#include "rope.h"

constexpr Kernels kernels = {ISA, embed, norm, rope, attention, activation, pool, linear};
