// Conversions between element types, and the lossless split of a float32 master.
#include <errno.h>
#include <string.h>

#include "float_mode.h"
#include "kernels.h"

int32_t gn_cast(void* dst, int32_t dst_dtype, const void* src, int32_t src_dtype, int64_t numel,
                int32_t isa) {
    const gn::Kernels* kernels = nullptr;
    if (!gn::is_dtype(dst_dtype) || !gn::is_dtype(src_dtype) || numel < 0) return -EINVAL;
    if (numel > 0 && (!dst || !src)) return -EINVAL;
    if (const int32_t status = gn::find_kernels(isa, &kernels)) return status;
    if (numel == 0) return 0;
    if (dst_dtype == src_dtype) {
        memcpy(dst, src, static_cast<size_t>(numel * gn::dtype_nbytes(dst_dtype)));
        return 0;
    }
    const gn::ScopedFloatMode float_mode;
    kernels->cast[dst_dtype][src_dtype](dst, src, numel);
    return 0;
}

int32_t gn_split_master(uint16_t* working, int16_t* residual, const float* master, int64_t numel,
                        int32_t isa) {
    const gn::Kernels* kernels = nullptr;
    if (numel < 0 || (numel > 0 && (!working || !residual || !master))) return -EINVAL;
    if (const int32_t status = gn::find_kernels(isa, &kernels)) return status;
    kernels->split(working, residual, master, numel);
    return 0;
}

int32_t gn_join_master(float* master, const uint16_t* working, const int16_t* residual, int64_t numel,
                       int32_t isa) {
    const gn::Kernels* kernels = nullptr;
    if (numel < 0 || (numel > 0 && (!working || !residual || !master))) return -EINVAL;
    if (const int32_t status = gn::find_kernels(isa, &kernels)) return status;
    kernels->join(master, working, residual, numel);
    return 0;
}
