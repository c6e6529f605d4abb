// Kernels for x86-64 with AVX-512 F, BW, DQ, VL: sixteen floats at a time.
// See [Note: One formula, many instruction sets].
#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

// The headers of GCC before 13 leave the unused operand of unmasked intrinsics uninitialised on purpose.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "kernels_template.h"

namespace gn {
namespace {

struct Avx512Vec {
    using F = __m512;
    using D = __m512d;
    static constexpr int64_t kWidth = 16;
    static constexpr int64_t kDoubleWidth = 8;

    static GN_INLINE __m256i load_16(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
    static GN_INLINE void store_16(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

    static GN_INLINE F splat(float value) { return _mm512_set1_ps(value); }
    static GN_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    static GN_INLINE F load(const Bf16* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16(p)), 16));
    }
    static GN_INLINE F load(const F16* p) { return _mm512_cvtph_ps(load_16(p)); }
    static GN_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static GN_INLINE void store(Bf16* p, F x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i upper = _mm512_srli_epi32(bits, 16);
        const __m512i is_odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
        const __m512i bias = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7FFF));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
        const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        store_16(p, _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, rounded, quiet)));
    }
    static GN_INLINE void store(F16* p, F x) { store_16(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
    static GN_INLINE F load_split(const uint16_t* working, const int16_t* residual) {
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16(working)), 16);
        return _mm512_castsi512_ps(_mm512_add_epi32(high, _mm512_cvtepi16_epi32(load_16(residual))));
    }
    static GN_INLINE void store_split(uint16_t* working, int16_t* residual, F x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
        store_16(working, _mm512_cvtepi32_epi16(high));
        store_16(residual, _mm512_cvtepi32_epi16(bits));
    }
    static GN_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static GN_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static GN_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static GN_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    static GN_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }

    static GN_INLINE D square(const float* p) {
        const D x = _mm512_cvtps_pd(_mm256_loadu_ps(p));
        return _mm512_mul_pd(x, x);
    }
    static GN_INLINE D load_double(const double* p) { return _mm512_loadu_pd(p); }
    static GN_INLINE void store_double(double* p, D x) { _mm512_storeu_pd(p, x); }
    static GN_INLINE D add_double(D a, D b) { return _mm512_add_pd(a, b); }
};

}  // namespace

const Kernels* kernels_avx512() { return make_kernels<Avx512Vec>(); }

}  // namespace gn

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace gn {

const Kernels* kernels_avx512() { return nullptr; }

}  // namespace gn

#endif
