// The kernels for the compiler's baseline.
#include "dispatch.h"

namespace pyembed {
namespace generic {
constexpr const char* ISA = "generic";
#include "vec_generic.h"

#include "kernels.h"
}  // namespace generic
const Kernels generic_kernels = generic::kernels;
}  // namespace pyembed
