// Kernels for AArch64: four floats at a time. Its baseline has all that is needed, so no target is widened.
#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "kernels_template.h"

namespace gn {
namespace {

struct NeonVec {
    using F = float32x4_t;
    using D = float64x2_t;
    static constexpr int64_t kWidth = 4;
    static constexpr int64_t kDoubleWidth = 2;

    static GN_INLINE F splat(float value) { return vdupq_n_f32(value); }
    static GN_INLINE F load(const float* p) { return vld1q_f32(p); }
    static GN_INLINE F load(const Bf16* p) {
        return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(&p->bits)), 16));
    }
    static GN_INLINE F load(const F16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
    static GN_INLINE void store(float* p, F x) { vst1q_f32(p, x); }
    static GN_INLINE void store(Bf16* p, F x) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        const uint32x4_t upper = vshrq_n_u32(bits, 16);
        const uint32x4_t is_odd = vandq_u32(upper, vdupq_n_u32(1));
        const uint32x4_t bias = vaddq_u32(is_odd, vdupq_n_u32(0x7FFF));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, bias), 16);
        const uint32x4_t quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
        const uint32x4_t is_number = vceqq_f32(x, x);
        vst1_u16(&p->bits, vmovn_u32(vbslq_u32(is_number, rounded, quiet)));
    }
    static GN_INLINE void store(F16* p, F x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
    static GN_INLINE F load_split(const uint16_t* working, const int16_t* residual) {
        const uint32x4_t high = vshlq_n_u32(vmovl_u16(vld1_u16(working)), 16);
        const uint32x4_t low = vreinterpretq_u32_s32(vmovl_s16(vld1_s16(residual)));
        return vreinterpretq_f32_u32(vaddq_u32(high, low));
    }
    static GN_INLINE void store_split(uint16_t* working, int16_t* residual, F x) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        vst1_u16(working, vshrn_n_u32(vaddq_u32(bits, vdupq_n_u32(0x8000)), 16));
        vst1_s16(residual, vreinterpret_s16_u16(vmovn_u32(bits)));
    }
    static GN_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
    static GN_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
    static GN_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
    static GN_INLINE F div(F a, F b) { return vdivq_f32(a, b); }
    static GN_INLINE F sqrt(F a) { return vsqrtq_f32(a); }

    static GN_INLINE D square(const float* p) {
        const D x = vcvt_f64_f32(vld1_f32(p));
        return vmulq_f64(x, x);
    }
    static GN_INLINE D load_double(const double* p) { return vld1q_f64(p); }
    static GN_INLINE void store_double(double* p, D x) { vst1q_f64(p, x); }
    static GN_INLINE D add_double(D a, D b) { return vaddq_f64(a, b); }
};

}  // namespace

const Kernels* kernels_neon() { return make_kernels<NeonVec>(); }

}  // namespace gn

#else

namespace gn {

const Kernels* kernels_neon() { return nullptr; }

}  // namespace gn

#endif
