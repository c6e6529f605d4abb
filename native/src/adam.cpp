// Adam: argument checks and the walk over segments. The formula is in kernels_template.h.
#include <errno.h>
#include <string.h>

#include <algorithm>

#include "float_mode.h"
#include "jobs.h"

namespace gn {
namespace {

bool are_segments_valid(const gn_adam_args& args) {
    if (args.num_segments < 0 || (args.num_segments > 0 && !args.segments)) return false;
    int64_t previous_end = 0;
    for (int64_t i = 0; i < args.num_segments; ++i) {
        const gn_adam_segment& segment = args.segments[i];
        if (segment.begin < previous_end || segment.end < segment.begin || segment.end > args.numel)
            return false;
        previous_end = segment.end;
    }
    return true;
}

void* advance(void* base, int64_t nbytes) { return base ? static_cast<char*>(base) + nbytes : nullptr; }

// Elements that are copied to where they are updated at once: few enough to stay in a core's own cache.
constexpr int64_t kCopiedNumel = 4096;

void copy_part(void* to, const void* from, int64_t itemsize, int64_t begin, int64_t end) {
    if (from)
        memcpy(static_cast<char*>(to) + begin * itemsize, static_cast<const char*>(from) + begin * itemsize,
               static_cast<size_t>((end - begin) * itemsize));
}

void update_in_place(const Kernels& kernels, const gn_adam_args& args, int64_t begin, int64_t end) {
    const gn_adam_segment* last = args.segments + args.num_segments;
    const gn_adam_segment* segment =
        std::partition_point(args.segments, last, [=](const gn_adam_segment& s) { return s.end <= begin; });
    for (; segment != last && segment->begin < end; ++segment) {
        const int64_t first = std::max(begin, segment->begin);
        AdamRun run;
        run.working = advance(args.working, first * working_nbytes(args.format));
        run.master = advance(args.master, first * master_nbytes(args.format));
        run.momentum = args.momentum + first;
        run.variance = args.variance + first;
        run.grad = static_cast<const char*>(args.grad) + first * dtype_nbytes(args.grad_dtype);
        run.numel = std::min(end, segment->end) - first;
        run.grad_scale = args.grad_scale;
        run.factors = segment;
        if (run.numel > 0) kernels.adam[args.format][args.grad_dtype](run);
    }
}

}  // namespace

bool is_in_place(const gn_adam_args& args) {
    return !args.from_working && !args.from_master && !args.from_momentum && !args.from_variance;
}

int32_t check_adam(const gn_adam_args* args, const Kernels** kernels) {
    if (!args || args->numel < 0 || !is_dtype(args->grad_dtype)) return -EINVAL;
    if (args->format < GN_FORMAT_SPLIT_BF16 || args->format > GN_FORMAT_F32) return -EINVAL;
    if (args->numel > 0) {
        if (!args->working || !args->momentum || !args->variance || !args->grad) return -EINVAL;
        if (!args->master && args->format != GN_FORMAT_F32) return -EINVAL;
    }
    if (!are_segments_valid(*args)) return -EINVAL;
    return find_kernels(args->isa, kernels);
}

void run_adam(const Kernels& kernels, const gn_adam_args& args, int64_t begin, int64_t end) {
    if (is_in_place(args)) return update_in_place(kernels, args, begin, end);
    for (; begin < end; begin += kCopiedNumel) {
        const int64_t next = std::min(end, begin + kCopiedNumel);
        copy_part(args.working, args.from_working, working_nbytes(args.format), begin, next);
        copy_part(args.master, args.from_master, master_nbytes(args.format), begin, next);
        copy_part(args.momentum, args.from_momentum, 4, begin, next);
        copy_part(args.variance, args.from_variance, 4, begin, next);
        update_in_place(kernels, args, begin, next);
    }
}

}  // namespace gn

int32_t gn_adam_update(const gn_adam_args* args) {
    const gn::Kernels* kernels = nullptr;
    if (const int32_t status = gn::check_adam(args, &kernels)) return status;
    const gn::ScopedFloatMode float_mode;
    gn::run_adam(*kernels, *args, 0, args->numel);
    return 0;
}
