// Internal: the table of inner loops that every instruction set provides, and how one is chosen.
#ifndef GEMINI_KERNELS_H
#define GEMINI_KERNELS_H

#include <stdint.h>

#include "gemini_native.h"

namespace gn {

// Elements in a leaf of the sum-of-squares tree (see gn_grad_store).
constexpr int64_t kSumsqBlockNumel = 4096;

// A run of consecutive elements that share one segment's factors; pointers are at its first element.
struct AdamRun {
    void* working;
    void* master;
    float* momentum;
    float* variance;
    const void* grad;
    int64_t numel;
    float grad_scale;
    const gn_adam_segment* factors;
};

// Inner loops of one instruction set. Arguments have been checked; nothing here can fail.
struct Kernels {
    // [destination type][source type]; equal types are copied elsewhere and are null here.
    void (*cast[3][3])(void* dst, const void* src, int64_t numel);
    void (*split)(uint16_t* working, int16_t* residual, const float* master, int64_t numel);
    void (*join)(float* master, const uint16_t* working, const int16_t* residual, int64_t numel);
    // [source type]: dst += float(src)
    void (*add[3])(float* dst, const void* src, int64_t numel);
    // [destination type][source type]: dst[i] = (parts[0][i] + parts[1][i] + ..) / divisor for i in
    // [begin, end), added in float in that order; null unless the destination is the source's type or float.
    void (*sum[3][3])(void* dst, const void* const* parts, int64_t num_parts, float divisor, int64_t begin,
                      int64_t end);
    // Root of the tree over exactly kSumsqBlockNumel values.
    double (*sumsq_block)(const float* values);
    // [state format][gradient type]
    void (*adam[3][3])(const AdamRun& run);
};

// Null where the build lacks the instruction set.
const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_neon();

// Finds the table for a gn_isa value; returns what gn_isa_check returns.
int32_t find_kernels(int32_t isa, const Kernels** kernels);

inline bool is_dtype(int32_t dtype) { return dtype >= GN_DTYPE_F32 && dtype <= GN_DTYPE_F16; }

inline int64_t dtype_nbytes(int32_t dtype) { return dtype == GN_DTYPE_F32 ? 4 : 2; }

}  // namespace gn

#endif  // GEMINI_KERNELS_H
