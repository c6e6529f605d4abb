// Which instruction sets this processor and this build have.
#include <errno.h>

#include <initializer_list>

#include "kernels.h"

namespace gn {
namespace {

// The compiler's run-time check also asks whether the operating system saves the wide registers.
bool has_avx2() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

}  // namespace

int32_t find_kernels(int32_t isa, const Kernels** kernels) {
    const Kernels* found = nullptr;
    switch (isa == GN_ISA_AUTO ? gn_isa_best() : isa) {
        case GN_ISA_SCALAR:
            found = kernels_scalar();
            break;
        case GN_ISA_AVX2:
            found = has_avx2() ? kernels_avx2() : nullptr;
            break;
        case GN_ISA_AVX512:
            found = has_avx512() ? kernels_avx512() : nullptr;
            break;
        case GN_ISA_NEON:
            found = kernels_neon();
            break;
        default:
            return -EINVAL;
    }
    *kernels = found;
    return found ? 0 : -ENOTSUP;
}

}  // namespace gn

int32_t gn_isa_best(void) {
    for (int32_t isa : {GN_ISA_AVX512, GN_ISA_AVX2, GN_ISA_NEON})
        if (gn_isa_check(isa) == 0) return isa;
    return GN_ISA_SCALAR;
}

int32_t gn_isa_check(int32_t isa) {
    const gn::Kernels* kernels = nullptr;
    return isa == GN_ISA_AUTO ? 0 : gn::find_kernels(isa, &kernels);
}
