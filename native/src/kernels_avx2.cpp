// Kernels for x86-64 with AVX2 and F16C: eight floats at a time. See [Note: One formula, many instruction
// sets].
#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#include "kernels_template.h"

namespace gn {
namespace {

struct Avx2Vec {
    using F = __m256;
    using D = __m256d;
    static constexpr int64_t kWidth = 8;
    static constexpr int64_t kDoubleWidth = 4;

    static GN_INLINE __m128i load_16(const void* p) {
        return _mm_loadu_si128(static_cast<const __m128i*>(p));
    }
    static GN_INLINE void store_16(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }

    // Narrow two vectors of eight 32-bit values below 65536 to sixteen bits each: `low` half, `high` half.
    static GN_INLINE __m256i narrow(__m256i low, __m256i high) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
    }

    static GN_INLINE F splat(float value) { return _mm256_set1_ps(value); }
    static GN_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
    static GN_INLINE F load(const Bf16* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p)), 16));
    }
    static GN_INLINE F load(const F16* p) { return _mm256_cvtph_ps(load_16(p)); }
    static GN_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static GN_INLINE void store(Bf16* p, F x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i upper = _mm256_srli_epi32(bits, 16);
        const __m256i is_odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
        const __m256i bias = _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7FFF));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
        const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i result = _mm256_blendv_epi8(rounded, quiet, is_nan);
        store_16(p, _mm256_castsi256_si128(narrow(result, result)));
    }
    static GN_INLINE void store(F16* p, F x) { store_16(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
    static GN_INLINE F load_split(const uint16_t* working, const int16_t* residual) {
        const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(working)), 16);
        return _mm256_castsi256_ps(_mm256_add_epi32(high, _mm256_cvtepi16_epi32(load_16(residual))));
    }
    static GN_INLINE void store_split(uint16_t* working, int16_t* residual, F x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16);
        const __m256i low = _mm256_and_si256(bits, _mm256_set1_epi32(0xFFFF));
        const __m256i both = narrow(high, low);
        store_16(working, _mm256_castsi256_si128(both));
        store_16(residual, _mm256_extracti128_si256(both, 1));
    }
    static GN_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    static GN_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static GN_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static GN_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
    static GN_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }

    static GN_INLINE D square(const float* p) {
        const D x = _mm256_cvtps_pd(_mm_loadu_ps(p));
        return _mm256_mul_pd(x, x);
    }
    static GN_INLINE D load_double(const double* p) { return _mm256_loadu_pd(p); }
    static GN_INLINE void store_double(double* p, D x) { _mm256_storeu_pd(p, x); }
    static GN_INLINE D add_double(D a, D b) { return _mm256_add_pd(a, b); }
};

}  // namespace

const Kernels* kernels_avx2() { return make_kernels<Avx2Vec>(); }

}  // namespace gn

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace gn {

const Kernels* kernels_avx2() { return nullptr; }

}  // namespace gn

#endif
