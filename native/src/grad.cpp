// Gradients: store or add, and the sum of squares in its fixed order.
#include <errno.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "c_api.h"
#include "float_mode.h"
#include "jobs.h"

namespace gn {
namespace {

const char* at(const void* base, int64_t index, int32_t dtype) {
    return static_cast<const char*>(base) + index * dtype_nbytes(dtype);
}

char* at(void* base, int64_t index, int32_t dtype) {
    return static_cast<char*>(base) + index * dtype_nbytes(dtype);
}

void store_block(const Kernels& kernels, const gn_grad_args& args, int64_t begin, int64_t numel) {
    const char* src = at(args.src, begin, args.src_dtype);
    char* dst = at(args.dst, begin, args.dst_dtype);
    if (args.mode == GN_GRAD_ADD)
        kernels.add[args.src_dtype](reinterpret_cast<float*>(dst), src, numel);
    else if (args.src_dtype != args.dst_dtype)
        kernels.cast[args.dst_dtype][args.src_dtype](dst, src, numel);
    else if (dst != src)
        memcpy(dst, src, static_cast<size_t>(numel * dtype_nbytes(args.src_dtype)));
}

double sum_block(const Kernels& kernels, const void* values, int32_t dtype, int64_t numel) {
    if (dtype == GN_DTYPE_F32 && numel == kSumsqBlockNumel)
        return kernels.sumsq_block(static_cast<const float*>(values));
    alignas(64) float padded[kSumsqBlockNumel];
    if (dtype == GN_DTYPE_F32)
        memcpy(padded, values, static_cast<size_t>(numel) * sizeof(float));
    else
        kernels.cast[GN_DTYPE_F32][dtype](padded, values, numel);
    std::fill(padded + numel, padded + kSumsqBlockNumel, 0.0f);
    return kernels.sumsq_block(padded);
}

}  // namespace

int32_t check_grad(const gn_grad_args* args, const Kernels** kernels) {
    if (!args || args->numel < 0 || !is_dtype(args->src_dtype)) return -EINVAL;
    if (args->mode != GN_GRAD_STORE && args->mode != GN_GRAD_ADD) return -EINVAL;
    if (args->dst_dtype != args->src_dtype && args->dst_dtype != GN_DTYPE_F32) return -EINVAL;
    if (args->numel > 0 && !args->src) return -EINVAL;
    if (args->mode == GN_GRAD_ADD) {
        if (args->dst_dtype != GN_DTYPE_F32) return -EINVAL;
        if (args->numel > 0 && (!args->dst || args->dst == args->src)) return -EINVAL;
    } else if (args->dst && args->dst == args->src && args->dst_dtype != args->src_dtype) {
        return -EINVAL;
    }
    return find_kernels(args->isa, kernels);
}

void run_grad(const Kernels& kernels, const gn_grad_args& args, int64_t begin, int64_t end,
              double* block_sums) {
    const void* values = args.dst ? args.dst : args.src;
    const int32_t dtype = args.dst ? args.dst_dtype : args.src_dtype;
    for (int64_t i = begin; i < end; i += kSumsqBlockNumel) {
        const int64_t numel = std::min(kSumsqBlockNumel, end - i);
        if (args.dst) store_block(kernels, args, i, numel);
        if (block_sums)
            block_sums[i / kSumsqBlockNumel] = sum_block(kernels, at(values, i, dtype), dtype, numel);
    }
}

int64_t padded_count(int64_t count) {
    int64_t padded = 1;
    while (padded < count) padded *= 2;
    return padded;
}

double reduce_block_sums(double* block_sums, int64_t num_blocks) {
    for (int64_t half = padded_count(num_blocks) / 2; half >= 1; half /= 2)
        for (int64_t i = 0; i < half; ++i) block_sums[i] += block_sums[i + half];
    return block_sums[0];
}

}  // namespace gn

int32_t gn_grad_store(const gn_grad_args* args) {
    const gn::Kernels* kernels = nullptr;
    if (const int32_t status = gn::check_grad(args, &kernels)) return status;
    const gn::ScopedFloatMode float_mode;
    if (!args->sumsq) {
        gn::run_grad(*kernels, *args, 0, args->numel, nullptr);
        return 0;
    }
    return gn::guarded([=]() -> int32_t {
        const int64_t num_blocks = gn::num_sumsq_blocks(args->numel);
        std::vector<double> block_sums(static_cast<size_t>(gn::padded_count(num_blocks)));
        gn::run_grad(*kernels, *args, 0, args->numel, block_sums.data());
        *args->sumsq = gn::reduce_block_sums(block_sums.data(), num_blocks);
        return 0;
    });
}
