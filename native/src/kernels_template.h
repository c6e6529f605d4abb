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

template <class V, class Dst, class Src>
GN_INLINE int64_t sum_run(Dst* dst, const void* const* parts, int64_t num_parts, float divisor, int64_t i,
                          int64_t end) {
    const typename V::F by = V::splat(divisor);
    for (; i + V::kWidth <= end; i += V::kWidth) {
        typename V::F sum = V::load(static_cast<const Src*>(parts[0]) + i);
        for (int64_t part = 1; part < num_parts; ++part)
            sum = V::add(sum, V::load(static_cast<const Src*>(parts[part]) + i));
        V::store(dst + i, V::div(sum, by));
    }
    return i;
}

template <class V, class Dst, class Src>
void sum_all(void* dst, const void* const* parts, int64_t num_parts, float divisor, int64_t begin,
             int64_t end) {
    Dst* to = static_cast<Dst*>(dst);
    const int64_t done = sum_run<V, Dst, Src>(to, parts, num_parts, divisor, begin, end);
    if (V::kWidth > 1) sum_run<ScalarVec, Dst, Src>(to, parts, num_parts, divisor, done, end);
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

// A segment's factors, each in every element of a vector.
template <class V>
struct AdamFactors {
    using F = typename V::F;
    explicit GN_INLINE AdamFactors(const AdamRun& run)
        : grad_scale(V::splat(run.grad_scale)),
          beta1_complement(V::splat(run.factors->beta1_complement)),
          beta2(V::splat(run.factors->beta2)),
          beta2_complement(V::splat(run.factors->beta2_complement)),
          neg_step_size(V::splat(run.factors->neg_step_size)),
          bias2_sqrt(V::splat(run.factors->bias2_sqrt)),
          eps(V::splat(run.factors->eps)),
          decay(V::splat(run.factors->decay)),
          l2(V::splat(run.factors->l2)) {}

    F grad_scale, beta1_complement, beta2, beta2_complement, neg_step_size, bias2_sqrt;
    F eps, decay, l2;
};

// Vectors that go through the stages of the update together. One element's update is a chain of some seventy
// cycles; a core looks ahead too little to overlap several of them unless their instructions alternate.
constexpr int kAdamUnroll = 3;

// The formula of gn_adam_update, one operation per line; returns the first element that is left.
template <class V, bool kHasL2, int kUnroll, class State, class Grad>
GN_INLINE int64_t adam_run(const AdamRun& run, int64_t i) {
    using F = typename V::F;
    constexpr int64_t kStride = kUnroll * V::kWidth;
    const State state(run);
    const AdamFactors<V> f(run);
    float* momentum = run.momentum;
    float* variance = run.variance;
    const Grad* grad = static_cast<const Grad*>(run.grad);
    for (const int64_t last = run.numel - kStride; i <= last; i += kStride) {
        F p[kUnroll], m[kUnroll], denominator[kUnroll];
        for (int k = 0; k < kUnroll; ++k) {
            const int64_t j = i + k * V::kWidth;
            p[k] = state.template load<V>(j);
            F g = V::mul(V::load(grad + j), f.grad_scale);
            if (kHasL2) g = V::add(g, V::mul(f.l2, p[k]));
            p[k] = V::mul(p[k], f.decay);
            m[k] = V::load(momentum + j);
            m[k] = V::add(m[k], V::mul(f.beta1_complement, V::sub(g, m[k])));
            F v = V::load(variance + j);
            v = V::add(V::mul(v, f.beta2), V::mul(V::mul(f.beta2_complement, g), g));
            V::store(momentum + j, m[k]);
            V::store(variance + j, v);
            denominator[k] = V::sqrt(v);
        }
        for (int k = 0; k < kUnroll; ++k)
            denominator[k] = V::add(V::div(denominator[k], f.bias2_sqrt), f.eps);
        for (int k = 0; k < kUnroll; ++k)
            p[k] = V::add(p[k], V::div(V::mul(f.neg_step_size, m[k]), denominator[k]));
        for (int k = 0; k < kUnroll; ++k) state.template store<V>(i + k * V::kWidth, p[k]);
    }
    return i;
}

template <class V, bool kHasL2, class State, class Grad>
GN_INLINE void adam_runs(const AdamRun& run) {
    int64_t done = 0;
    if (V::kWidth > 1) {
        done = adam_run<V, kHasL2, kAdamUnroll, State, Grad>(run, done);
        done = adam_run<V, kHasL2, 1, State, Grad>(run, done);
    }
    adam_run<ScalarVec, kHasL2, 1, State, Grad>(run, done);
}

template <class V, class State, class Grad>
void adam_all(const AdamRun& run) {
    if (run.factors->l2 != 0.0f)
        adam_runs<V, true, State, Grad>(run);
    else
        adam_runs<V, false, State, Grad>(run);
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
        {{sum_all<V, float, float>, sum_all<V, float, Bf16>, sum_all<V, float, F16>},
         {nullptr, sum_all<V, Bf16, Bf16>, nullptr},
         {nullptr, nullptr, sum_all<V, F16, F16>}},
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
