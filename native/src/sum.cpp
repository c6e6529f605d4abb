// Sums of what several processes have: in binary32, in the order given, rounded once.
#include <errno.h>

#include "float_mode.h"
#include "jobs.h"

namespace gn {

int32_t check_sum(const gn_sum_args* args, const Kernels** kernels) {
    if (!args || args->numel < 0 || !is_dtype(args->dtype)) return -EINVAL;
    if (args->dst_dtype != args->dtype && args->dst_dtype != GN_DTYPE_F32) return -EINVAL;
    if (args->num_parts < 1 || args->num_parts > GN_MAX_PARTS || !args->parts) return -EINVAL;
    for (int32_t part = 0; args->numel > 0 && part < args->num_parts; ++part) {
        if (!args->parts[part]) return -EINVAL;
        if (args->parts[part] == args->dst && args->dst_dtype != args->dtype) return -EINVAL;
    }
    if (args->numel > 0 && !args->dst) return -EINVAL;
    return find_kernels(args->isa, kernels);
}

void run_sum(const Kernels& kernels, const gn_sum_args& args, int64_t begin, int64_t end) {
    kernels.sum[args.dst_dtype][args.dtype](args.dst, args.parts, args.num_parts, args.divisor, begin, end);
}

}  // namespace gn

int32_t gn_sum_parts(const gn_sum_args* args) {
    const gn::Kernels* kernels = nullptr;
    if (const int32_t status = gn::check_sum(args, &kernels)) return status;
    const gn::ScopedFloatMode float_mode;
    gn::run_sum(*kernels, *args, 0, args->numel);
    return 0;
}
