// Internal: every inner loop, written once over a vector abstraction.
//
// [Note: One formula, many instruction sets]
// A kernels_<isa>.cpp file includes the system headers, then widens the compiler's target by pragma, then
// includes this file and defines a vector type `Vec`. Two things keep that sound:
//   - Everything here is in an anonymous namespace, so no function compiled for a wide target can be
//     merged by the linker with one of the same name that runs on every processor.
//   - Nothing here uses the standard library, whose inline functions would be merged so.
// ScalarVec is the vector of one element. It is the whole scalar instruction set, and the tail of the others.
// A vector type has a width, a float vector F and a double vector D, and the static functions of ScalarVec.
#ifndef GEMINI_KERNELS_TEMPLATE_H
#define GEMINI_KERNELS_TEMPLATE_H

#include "kernels.h"

#define GN_INLINE inline __attribute__((always_inline))

namespace gn {
namespace {

// Storage types; distinct so that overloads and tables can tell them apart.
struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

// ------------------------------------------------------------------ one element

GN_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return bits;
}

GN_INLINE float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
}

// Nearest bf16, ties to even. A NaN keeps its sign and upper payload and becomes quiet.
GN_INLINE uint16_t bf16_from_float(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

GN_INLINE float float_from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// Nearest binary16, ties to even, as VCVTPS2PH does it: NaN as above, subnormals exact, overflow infinite.
GN_INLINE uint16_t f16_from_float(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    // One unit of 0.5f is one unit of a binary16 subnormal, so this addition rounds to it.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    // Exponent bias 127 -> 15, then round the 13 bits that go.
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t nan = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477FF000u ? 0x7C00u : result;
    result = magnitude > 0x7F800000u ? nan : result;
    return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | result);
}

// Exact; a NaN becomes quiet, as VCVTPH2PS does it.
GN_INLINE float float_from_f16(uint16_t half) {
    const uint32_t magnitude = half & 0x7FFFu;
    const uint32_t shifted = magnitude << 13;
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    uint32_t result = magnitude < 0x0400u ? subnormal : shifted + (112u << 23);
    result = magnitude >= 0x7C00u ? (shifted | 0x7F800000u) : result;
    result = magnitude > 0x7C00u ? (result | 0x00400000u) : result;
    return float_of((static_cast<uint32_t>(half & 0x8000u) << 16) | result);
}

struct ScalarVec {
    using F = float;
    using D = double;
    static constexpr int64_t kWidth = 1;
    static constexpr int64_t kDoubleWidth = 1;

    static GN_INLINE F splat(float value) { return value; }
    static GN_INLINE F load(const float* p) { return *p; }
    static GN_INLINE F load(const Bf16* p) { return float_from_bf16(p->bits); }
    static GN_INLINE F load(const F16* p) { return float_from_f16(p->bits); }
    static GN_INLINE void store(float* p, F x) { *p = x; }
    static GN_INLINE void store(Bf16* p, F x) { p->bits = bf16_from_float(x); }
    static GN_INLINE void store(F16* p, F x) { p->bits = f16_from_float(x); }
    static GN_INLINE F load_split(const uint16_t* working, const int16_t* residual) {
        const uint32_t low = static_cast<uint32_t>(static_cast<int32_t>(*residual));
        return float_of((static_cast<uint32_t>(*working) << 16) + low);
    }
    static GN_INLINE void store_split(uint16_t* working, int16_t* residual, F x) {
        const uint32_t bits = bits_of(x);
        *working = static_cast<uint16_t>((bits + 0x8000u) >> 16);
        *residual = static_cast<int16_t>(static_cast<uint16_t>(bits));
    }
    static GN_INLINE F add(F a, F b) { return a + b; }
    static GN_INLINE F sub(F a, F b) { return a - b; }
    static GN_INLINE F mul(F a, F b) { return a * b; }
    static GN_INLINE F div(F a, F b) { return a / b; }
    static GN_INLINE F sqrt(F a) { return __builtin_sqrtf(a); }

    static GN_INLINE D square(const float* p) { return static_cast<double>(*p) * static_cast<double>(*p); }
    static GN_INLINE D load_double(const double* p) { return *p; }
    static GN_INLINE void store_double(double* p, D x) { *p = x; }
    static GN_INLINE D add_double(D a, D b) { return a + b; }
};

// ------------------------------------------------------------------ casts

template <class V, class Dst, class Src>
GN_INLINE int64_t cast_run(Dst* dst, const Src* src, int64_t i, int64_t numel) {
    for (; i + V::kWidth <= numel; i += V::kWidth) V::store(dst + i, V::load(src + i));
    return i;
}

template <class V, class Dst, class Src>
void cast_all(void* dst, const void* src, int64_t numel) {
    Dst* to = static_cast<Dst*>(dst);
    const Src* from = static_cast<const Src*>(src);
    const int64_t done = cast_run<V>(to, from, 0, numel);
    if (V::kWidth > 1) cast_run<ScalarVec>(to, from, done, numel);
}

template <class V>
GN_INLINE int64_t split_run(uint16_t* working, int16_t* residual, const float* master, int64_t i,
                            int64_t numel) {
    for (; i + V::kWidth <= numel; i += V::kWidth)
        V::store_split(working + i, residual + i, V::load(master + i));
    return i;
}

template <class V>
void split_all(uint16_t* working, int16_t* residual, const float* master, int64_t numel) {
    const int64_t done = split_run<V>(working, residual, master, 0, numel);
    if (V::kWidth > 1) split_run<ScalarVec>(working, residual, master, done, numel);
}

template <class V>
GN_INLINE int64_t join_run(float* master, const uint16_t* working, const int16_t* residual, int64_t i,
                           int64_t numel) {
    for (; i + V::kWidth <= numel; i += V::kWidth)
        V::store(master + i, V::load_split(working + i, residual + i));
    return i;
}

template <class V>
void join_all(float* master, const uint16_t* working, const int16_t* residual, int64_t numel) {
    const int64_t done = join_run<V>(master, working, residual, 0, numel);
    if (V::kWidth > 1) join_run<ScalarVec>(master, working, residual, done, numel);
}

// ------------------------------------------------------------------ gradients

template <class V, class Src>
GN_INLINE int64_t add_run(float* dst, const Src* src, int64_t i, int64_t numel) {
    for (; i + V::kWidth <= numel; i += V::kWidth)
        V::store(dst + i, V::add(V::load(dst + i), V::load(src + i)));
    return i;
}

template <class V, class Src>
void add_all(float* dst, const void* src, int64_t numel) {
    const Src* from = static_cast<const Src*>(src);
    const int64_t done = add_run<V>(dst, from, 0, numel);
    if (V::kWidth > 1) add_run<ScalarVec>(dst, from, done, numel);
}

// The first three halvings (h = 2048, 1024, 512) happen in registers while squaring.
template <class V>
double sumsq_block(const float* x) {
    constexpr int64_t kStream = kSumsqBlockNumel / 8;
    alignas(64) double sums[kStream];
    for (int64_t j = 0; j < kStream; j += V::kDoubleWidth) {
        const float* p = x + j;
        const auto s0 = V::add_double(V::square(p), V::square(p + 4 * kStream));
        const auto s1 = V::add_double(V::square(p + kStream), V::square(p + 5 * kStream));
        const auto s2 = V::add_double(V::square(p + 2 * kStream), V::square(p + 6 * kStream));
        const auto s3 = V::add_double(V::square(p + 3 * kStream), V::square(p + 7 * kStream));
        V::store_double(sums + j, V::add_double(V::add_double(s0, s2), V::add_double(s1, s3)));
    }
    int64_t half = kStream / 2;
    for (; half >= V::kDoubleWidth; half /= 2)
        for (int64_t j = 0; j < half; j += V::kDoubleWidth)
            V::store_double(sums + j,
                            V::add_double(V::load_double(sums + j), V::load_double(sums + j + half)));
    for (; half >= 1; half /= 2)
        for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
    return sums[0];
}

// ------------------------------------------------------------------ Adam

// How each gn_state_format reads and writes the master of element i.
struct SplitState {
    uint16_t* working;
    int16_t* residual;
    explicit GN_INLINE SplitState(const AdamRun& run)
        : working(static_cast<uint16_t*>(run.working)), residual(static_cast<int16_t*>(run.master)) {}
    template <class V>
    GN_INLINE typename V::F load(int64_t i) const {
        return V::load_split(working + i, residual + i);
    }
    template <class V>
    GN_INLINE void store(int64_t i, typename V::F x) const {
        V::store_split(working + i, residual + i, x);
    }
};

struct F16State {
    F16* working;
    float* master;
    explicit GN_INLINE F16State(const AdamRun& run)
        : working(static_cast<F16*>(run.working)), master(static_cast<float*>(run.master)) {}
    template <class V>
    GN_INLINE typename V::F load(int64_t i) const {
        return V::load(master + i);
    }
    template <class V>
    GN_INLINE void store(int64_t i, typename V::F x) const {
        V::store(master + i, x);
        V::store(working + i, x);
    }
};

struct F32State {
    float* working;
    explicit GN_INLINE F32State(const AdamRun& run) : working(static_cast<float*>(run.working)) {}
    template <class V>
    GN_INLINE typename V::F load(int64_t i) const {
        return V::load(working + i);
    }
    template <class V>
    GN_INLINE void store(int64_t i, typename V::F x) const {
        V::store(working + i, x);
    }
};

// The formula of gn_adam_update, one operation per line.
template <class V, class State, class Grad>
GN_INLINE int64_t adam_run(const AdamRun& run, int64_t i) {
    using F = typename V::F;
    const State state(run);
    float* momentum = run.momentum;
    float* variance = run.variance;
    const Grad* grad = static_cast<const Grad*>(run.grad);
    const int64_t numel = run.numel;
    const gn_adam_segment factors = *run.factors;
    const F grad_scale = V::splat(run.grad_scale);
    const F beta1_complement = V::splat(factors.beta1_complement);
    const F beta2 = V::splat(factors.beta2);
    const F beta2_complement = V::splat(factors.beta2_complement);
    const F neg_step_size = V::splat(factors.neg_step_size);
    const F bias2_sqrt = V::splat(factors.bias2_sqrt);
    const F eps = V::splat(factors.eps);
    const F decay = V::splat(factors.decay);
    const F l2 = V::splat(factors.l2);
    const bool has_l2 = factors.l2 != 0.0f;
    for (; i + V::kWidth <= numel; i += V::kWidth) {
        F p = state.template load<V>(i);
        F g = V::mul(V::load(grad + i), grad_scale);
        if (has_l2) g = V::add(g, V::mul(l2, p));
        p = V::mul(p, decay);
        F m = V::load(momentum + i);
        m = V::add(m, V::mul(beta1_complement, V::sub(g, m)));
        F v = V::load(variance + i);
        v = V::add(V::mul(v, beta2), V::mul(V::mul(beta2_complement, g), g));
        const F denominator = V::add(V::div(V::sqrt(v), bias2_sqrt), eps);
        p = V::add(p, V::div(V::mul(neg_step_size, m), denominator));
        V::store(momentum + i, m);
        V::store(variance + i, v);
        state.template store<V>(i, p);
    }
    return i;
}

template <class V, class State, class Grad>
void adam_all(const AdamRun& run) {
    const int64_t done = adam_run<V, State, Grad>(run, 0);
    if (V::kWidth > 1) adam_run<ScalarVec, State, Grad>(run, done);
}

// ------------------------------------------------------------------ the table

template <class V>
const Kernels* make_kernels() {
    static constexpr Kernels kTable = {
        {{nullptr, cast_all<V, float, Bf16>, cast_all<V, float, F16>},
         {cast_all<V, Bf16, float>, nullptr, cast_all<V, Bf16, F16>},
         {cast_all<V, F16, float>, cast_all<V, F16, Bf16>, nullptr}},
        split_all<V>,
        join_all<V>,
        {add_all<V, float>, add_all<V, Bf16>, add_all<V, F16>},
        sumsq_block<V>,
        {{adam_all<V, SplitState, float>, adam_all<V, SplitState, Bf16>, adam_all<V, SplitState, F16>},
         {adam_all<V, F16State, float>, adam_all<V, F16State, Bf16>, adam_all<V, F16State, F16>},
         {adam_all<V, F32State, float>, adam_all<V, F32State, Bf16>, adam_all<V, F32State, F16>}},
    };
    return &kTable;
}

}  // namespace
}  // namespace gn

#endif  // GEMINI_KERNELS_TEMPLATE_H
