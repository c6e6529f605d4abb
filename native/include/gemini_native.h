/*
 * gemini_native.h - the C interface of Gemini's native layer.
 *
 * Rules that hold for every function:
 *   - Return 0 on success or a negative errno value; the global errno is never the channel.
 *   - No C++ exception crosses this interface (out of memory is -ENOMEM, one without a number -EIO).
 *   - In a process that was forked after a pool or an engine was created there are none of its threads: every
 *     function that takes it returns -ESRCH there and changes nothing.
 *   - Sizes ending in `numel` count elements, those ending in `nbytes` count bytes.
 *   - Pointers to tensor data need the natural alignment of their element type only;
 *     64-byte alignment is fastest. Buffers of one call must not overlap unless said so.
 *   - Results are bit-identical for every instruction set and every number of threads.
 *   - Floating point follows IEEE 754 binary32/binary64, round to nearest even, with no
 *     contraction of a*b+c into a fused operation and with subnormals, whatever mode the caller's
 *     thread is in. Which NaN an arithmetic operation yields is not fixed; casts keep sign and payload.
 *   - Nothing here knows torch, Python or the interpreter lock. Calls may come from any thread.
 *
 * Between the two CDEF markers the text is plain C that cffi parses unchanged:
 * no preprocessor directives are allowed there.
 */
#ifndef GEMINI_NATIVE_H
#define GEMINI_NATIVE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* CDEF-BEGIN */

/* ------------------------------------------------------------------ instruction sets */

enum gn_isa {
    GN_ISA_AUTO = 0,   /* the best one this processor has */
    GN_ISA_SCALAR = 1, /* plain C++, present everywhere */
    GN_ISA_AVX2 = 2,   /* x86-64 with AVX2, FMA and F16C */
    GN_ISA_AVX512 = 3, /* x86-64 with AVX-512 F, BW, DQ and VL */
    GN_ISA_NEON = 4    /* AArch64 */
};

/* Best instruction set of this processor that was compiled in; never GN_ISA_AUTO. */
int32_t gn_isa_best(void);

/* 0 if kernels can run with `isa` here, -ENOTSUP if the processor or the build lacks it,
 * -EINVAL if the value is unknown. */
int32_t gn_isa_check(int32_t isa);

/* ------------------------------------------------------------------ element types */

enum gn_dtype {
    GN_DTYPE_F32 = 0,  /* IEEE binary32 */
    GN_DTYPE_BF16 = 1, /* upper half of binary32 */
    GN_DTYPE_F16 = 2   /* IEEE binary16 */
};

/* ------------------------------------------------------------------ casts */

/* Convert `numel` elements, rounding to nearest even. src and dst must not overlap.
 * Blocking, single thread. -EINVAL: unknown type or negative count; -ENOTSUP: isa. */
int32_t gn_cast(void* dst, int32_t dst_dtype, const void* src, int32_t src_dtype, int64_t numel, int32_t isa);

/* Split float32 masters into a bf16 working weight and an int16 residual, losslessly:
 *     working  = (bits(master) + 0x8000) >> 16            nearest bf16, ties away from zero
 *     residual = bits(master) - (working << 16)           in [-32768, 32767], modulo 2^32
 * Blocking, single thread. */
int32_t gn_split_master(uint16_t* working, int16_t* residual, const float* master, int64_t numel,
                        int32_t isa);

/* Inverse of gn_split_master: bits(master) = (working << 16) + residual, modulo 2^32. */
int32_t gn_join_master(float* master, const uint16_t* working, const int16_t* residual, int64_t numel,
                       int32_t isa);

/* ------------------------------------------------------------------ gradients */

enum gn_grad_mode {
    GN_GRAD_STORE = 0, /* dst = convert(src) */
    GN_GRAD_ADD = 1    /* dst = dst + convert(src), in float32; dst_dtype must be GN_DTYPE_F32 */
};

/* One parameter's gradient on its way to its home. */
typedef struct gn_grad_args {
    int32_t mode;      /* gn_grad_mode */
    int32_t src_dtype; /* gn_dtype */
    int32_t dst_dtype; /* src_dtype or GN_DTYPE_F32 */
    int32_t isa;       /* gn_isa */
    const void* src;   /* [numel]; read only; may equal dst only when mode is STORE and types agree */
    void* dst;         /* [numel]; may be NULL with STORE: then only the sum of squares is computed */
    int64_t numel;
    double* sumsq; /* out: sum of squares of the values stored in dst (of src if dst is NULL);
                      NULL: not wanted */
} gn_grad_args;

/* Store or add one gradient and compute the sum of squares of the result.
 *
 * The sum's order is fixed, so that every instruction set, thread count and device can
 * reproduce its bits: values are squared in binary64 (exact); elements are cut into blocks of
 * 4096, zero padded; within a block a[i] += a[i + h] for h = 2048, 1024 .. 1; the block sums
 * are padded with zeros to a power of two and reduced the same way, h = half the length first.
 * An infinite or NaN element makes the result infinite or NaN; no finite float32 does.
 * numel = 0 gives 0.0. Blocking, single thread. */
int32_t gn_grad_store(const gn_grad_args* args);

enum { GN_MAX_PARTS = 1024 };

/* What several processes have of the same gradients. */
typedef struct gn_sum_args {
    int32_t dtype;            /* gn_dtype of the parts */
    int32_t dst_dtype;        /* dtype or GN_DTYPE_F32 */
    int32_t isa;              /* gn_isa */
    int32_t num_parts;        /* 1 to GN_MAX_PARTS */
    const void* const* parts; /* [num_parts] pointers to [numel] elements; read only */
    void* dst;                /* [numel]; may be one of the parts if the types agree */
    int64_t numel;
    float divisor; /* what the sum is divided by */
} gn_sum_args;

/* Add parts in binary32, one after another in the order given, divide, and round once to dst_dtype:
 *     dst[i] = round((..((parts[0][i] + parts[1][i]) + parts[2][i]) + ..) / divisor)
 * numel = 0 does nothing. Blocking, single thread. -EINVAL: unknown type, negative count, too many parts or
 * none; -ENOTSUP: isa. */
int32_t gn_sum_parts(const gn_sum_args* args);

/* ------------------------------------------------------------------ Adam */

enum gn_state_format {
    GN_FORMAT_SPLIT_BF16 = 0, /* working bf16, master = int16 residual: see gn_split_master */
    GN_FORMAT_F16_MASTER = 1, /* working f16, master float32; working = round-to-nearest-even(master) */
    GN_FORMAT_F32 = 2         /* working float32 is the master; `master` is ignored */
};

/* Hyper-parameters of a run of elements. All factors are already rounded to float32. */
typedef struct gn_adam_segment {
    int64_t begin;          /* first element, relative to the pointers of the call */
    int64_t end;            /* one past the last element; segments are sorted and disjoint;
                               elements in no segment are left untouched */
    float beta1_complement; /* 1 - beta1 */
    float beta2;
    float beta2_complement; /* 1 - beta2 */
    float neg_step_size;    /* -lr / (1 - beta1^t) */
    float bias2_sqrt;       /* sqrt(1 - beta2^t) */
    float eps;
    float decay; /* AdamW: 1 - lr * weight_decay; 1 for none */
    float l2;    /* Adam: weight_decay added to the gradient; 0 for none */
} gn_adam_segment;

typedef struct gn_adam_args {
    int32_t format;     /* gn_state_format */
    int32_t grad_dtype; /* gn_dtype; any of the three with any format */
    int32_t isa;        /* gn_isa */
    float grad_scale;   /* multiplies every gradient: unscaling and clipping folded together */
    void* working;      /* [numel] bf16, f16 or float32; overwritten */
    void* master;       /* [numel] int16 or float32; overwritten; NULL for GN_FORMAT_F32 */
    float* momentum;    /* [numel]; overwritten */
    float* variance;    /* [numel]; overwritten */
    const void* grad;   /* [numel]; read only */
    int64_t numel;
    const gn_adam_segment* segments;
    int64_t num_segments;
    /* What the four are before the update, elements in no segment included; NULL: they are in place. Where
     * not NULL, as long as what is overwritten, and not overlapping it. */
    const void* from_working;
    const void* from_master;
    const float* from_momentum;
    const float* from_variance;
} gn_adam_args;

/* One Adam or AdamW update, in one pass. Per element, every operation rounded to
 * binary32, in torch.optim.AdamW's order of operations (Loshchilov & Hutter 2019, algorithm 2):
 *     p = master;  g = float(grad) * grad_scale
 *     if l2 != 0:  g = g + l2 * p
 *     p = p * decay
 *     m = m + beta1_complement * (g - m)
 *     v = v * beta2 + (beta2_complement * g) * g
 *     p = p + (neg_step_size * m) / (sqrt(v) / bias2_sqrt + eps)
 * Blocking, single thread. -EINVAL: unknown format or type, unsorted segments or segments
 * out of [0, numel]. */
int32_t gn_adam_update(const gn_adam_args* args);

/* ------------------------------------------------------------------ journals */

enum {
    GN_JOURNAL_BLOCK_NUMEL = 1024,     /* elements that become new together */
    GN_JOURNAL_SCRATCH_NBYTES = 16384, /* of one thread's scratch; a power of two */
    GN_JOURNAL_IMAGE_OFFSET = 64       /* where in a scratch the image begins */
};

/* Lets an update be interrupted by the end of the process at any instruction. Everything it points to lies in
 * memory that outlives the process, as what is updated does.
 *
 * A block of GN_JOURNAL_BLOCK_NUMEL elements is updated so: its working weights, master (but in
 * GN_FORMAT_F32), momentum and variance are copied to the thread's scratch, one after the other without
 * gaps, from GN_JOURNAL_IMAGE_OFFSET on; sequence << 32 | number of the block is stored at the scratch's
 * beginning; the block is updated in place; its entry in `done` becomes `sequence`. A later
 * process copies the image of each scratch back whose block has another entry than the scratch's sequence;
 * then each block is old or new. A block whose entry is `sequence` already is left alone, so the same call
 * finishes the update. What is journalled is in place: no `from_` pointer is set. */
typedef struct gn_adam_journal {
    uint32_t sequence;     /* more than 0; differs from update to update */
    uint32_t first_block;  /* number of the first block of the call */
    uint32_t* done;        /* one entry for each block of the call */
    void* scratches;       /* [num_scratches * GN_JOURNAL_SCRATCH_NBYTES], aligned to 64 bytes */
    int32_t num_scratches; /* at least as many as threads */
} gn_adam_journal;

enum gn_journal_stop {
    GN_STOP_COPIED = 1,  /* the image is there, the scratch does not say so yet */
    GN_STOP_NOTED = 2,   /* the scratch says whose image it holds */
    GN_STOP_UPDATED = 3, /* the first half of the block is new */
    GN_STOP_WHOLE = 4    /* all of it is, and the entry does not say so yet */
};

/* For tests: run gn_adam_update with a journal up to block number `block` of the call, of that one the part
 * that `stop` names, and no further: what a process leaves that ends there. Uses the first scratch.
 * Blocking, single thread. -EINVAL as gn_adam_update, or the journal is malformed. */
int32_t gn_adam_update_partly(const gn_adam_args* args, const gn_adam_journal* journal, int64_t block,
                              int32_t stop);

/* ------------------------------------------------------------------ memory sweep */

enum gn_sweep_mode {
    GN_SWEEP_READ = 0,  /* read every byte */
    GN_SWEEP_INVERT = 1 /* read every byte and write its complement */
};

typedef struct gn_sweep_buffer {
    void* data;
    int64_t nbytes;
    int32_t mode; /* gn_sweep_mode */
} gn_sweep_buffer;

/* ------------------------------------------------------------------ spans */

/* When a job or request ran: from the moment a thread, or the kernel, was given its first part to its
 * completion. CLOCK_MONOTONIC. */
typedef struct gn_span {
    uint64_t ticket;
    int64_t begin_ns;
    int64_t end_ns;
} gn_span;

enum { GN_MAX_SPANS = 1048576 };

/* ------------------------------------------------------------------ worker pool */

/* A fixed set of threads that run the kernels above, most urgent job first. */
typedef struct gn_pool gn_pool;

/* Start `num_threads` threads, 1 to 4096; returns when they run. */
int32_t gn_pool_create(gn_pool** pool, int32_t num_threads);

/* Write the threads' Linux thread ids, for sched_setaffinity and setpriority, to thread_ids[num_threads]; 0
 * on other systems. Does not block. */
int32_t gn_pool_thread_ids(gn_pool* pool, int32_t* thread_ids);

enum gn_priority {
    GN_PRIORITY_BACKGROUND = 1048576 /* jobs of this priority number or above are background jobs */
};

/* Let at most `max_threads` >= 1 threads run background jobs at the same time, from the next block on; all
 * may at first. Background jobs leave the other threads free for urgent ones, and the processors for whatever
 * else the process computes. */
int32_t gn_pool_limit_background(gn_pool* pool, int32_t max_threads);

/* Drop what is queued, finish what is running, join the threads. Dropped tickets complete with -ECANCELED;
 * gn_pool_wait still answers for every ticket, submitting is refused with -ECANCELED. Blocking; a second
 * call does nothing. Must not be called from two threads at once. */
int32_t gn_pool_shutdown(gn_pool* pool);

/* gn_pool_shutdown, release who is still inside gn_pool_wait, free. NULL is allowed. */
int32_t gn_pool_destroy(gn_pool* pool);

/* Submit a job; never blocks. `args` and its segment array are copied, the buffers they point to must stay
 * valid until the ticket has completed. Jobs with a lower `priority` start first, equal ones in
 * order of submission; a job is cut into blocks that any idle thread takes. A job's result does not
 * depend on the cut. *ticket is never 0. */
int32_t gn_pool_submit_adam(gn_pool* pool, const gn_adam_args* args, int32_t priority, uint64_t* ticket);
int32_t gn_pool_submit_grad(gn_pool* pool, const gn_grad_args* args, int32_t priority, uint64_t* ticket);
int32_t gn_pool_submit_copy(gn_pool* pool, void* dst, const void* src, int64_t nbytes, int32_t priority,
                            uint64_t* ticket);

/* Submit gn_sum_parts; its array of pointers is copied too. */
int32_t gn_pool_submit_sum(gn_pool* pool, const gn_sum_args* args, int32_t priority, uint64_t* ticket);

/* gn_pool_submit_adam with a journal, which is copied. -EINVAL if it has fewer scratches than the pool has
 * threads. */
int32_t gn_pool_submit_adam_journalled(gn_pool* pool, const gn_adam_args* args,
                                       const gn_adam_journal* journal, int32_t priority, uint64_t* ticket);

/* Submit a pass over several buffers at once, each advancing in proportion to its length, as a kernel with
 * these operands would: the rate at which memory can deliver them to these threads. The buffer array is
 * copied. *checksum must stay valid until the ticket has completed and is written then: the XOR of all 64-bit
 * words that were read, each buffer zero padded to whole words. */
int32_t gn_pool_submit_sweep(gn_pool* pool, const gn_sweep_buffer* buffers, int64_t num_buffers,
                             uint64_t* checksum, int32_t priority, uint64_t* ticket);

/* Submit the first touch of a fresh private mapping, by several threads at once: its pages exist afterwards,
 * and their content is unchanged. `address` is page aligned. The memory may be written to meanwhile; it must
 * stay mapped until the ticket has completed. A page that the system refuses here is left to its first use.
 */
int32_t gn_pool_submit_populate(gn_pool* pool, void* address, int64_t nbytes, int32_t priority,
                                uint64_t* ticket);

/* Wait for a ticket. Returns the job's result, -ETIMEDOUT after timeout_ns (negative: wait for
 * ever; 0: only look) or -EINVAL for a ticket that was never issued. May be asked
 * repeatedly and from several threads; results of completed tickets cost no memory when they are 0. */
int32_t gn_pool_wait(gn_pool* pool, uint64_t ticket, int64_t timeout_ns);

/* Keep the spans of jobs that begin from now on; once `capacity` of them, at most GN_MAX_SPANS, wait to be
 * taken, further ones are lost. Those kept so far are dropped. 0, as in the beginning: keep none, at no cost.
 */
int32_t gn_pool_keep_spans(gn_pool* pool, int64_t capacity);

/* Move the oldest spans to spans[max_count], in order of completion; returns how many, or -errno. */
int64_t gn_pool_take_spans(gn_pool* pool, gn_span* spans, int64_t max_count);

/* ------------------------------------------------------------------ memory nodes */

/* Ask for the pages of a fresh mapping to be dealt out over `nodes` in turn as they are first touched (mbind,
 * MPOL_INTERLEAVE). `address` is page aligned. Pages that exist stay where they are. Node numbers are below
 * 1024. -ENOSYS: no such system call here; -EPERM, -EINVAL: as mbind(2). */
int32_t gn_memory_interleave(void* address, int64_t nbytes, const int32_t* nodes, int32_t num_nodes);

enum gn_populate_way {
    GN_POPULATE_BY_ADVICE = 1, /* MADV_POPULATE_WRITE, Linux 5.14 */
    GN_POPULATE_BY_TOUCH = 2   /* a write of what is there to each page; works everywhere */
};

/* Give the pages of a mapping that is writable by this process their memory, with content unchanged, even if
 * other threads write to it meanwhile. Blocking, single thread. `address` is page aligned. -EINVAL: unknown
 * way, or a kernel that does not know it; else as madvise(2). */
int32_t gn_memory_populate(void* address, int64_t nbytes, int32_t way);

/* Map the first `nbytes` bytes of a file for reading and writing, shared with all who map it, from a multiple
 * of 2 MiB on. A memory file's pages become huge ones where the kernel can do that (MADV_COLLAPSE, Linux 6.1,
 * which needs no permission; else where the administrator allows it), and else stay small: no error.
 * Blocking; takes as long as the kernel takes to copy what the file holds. -EINVAL: nbytes is no multiple of
 * 4096; else as mmap(2). */
int32_t gn_memory_map(int32_t descriptor, int64_t nbytes, void** address);

/* Undo gn_memory_map. */
int32_t gn_memory_unmap(void* address, int64_t nbytes);

/* Store a word as a mark that earlier stores are complete. A later process that reads the memory, after this
 * one ended at any instruction, finds everything stored before this call if it finds `value`, and nothing
 * stored after this call if it does not. `place` is aligned to 8 bytes. */
void gn_memory_publish(uint64_t* place, uint64_t value);

/* Load a word that another process publishes: what it stored before is visible after this call. */
uint64_t gn_memory_load(const uint64_t* place);

/* ------------------------------------------------------------------ events between processes */

/* An event is a word in memory that processes share, aligned to 4 bytes: it counts signals, modulo 2^32. Who
 * waits for something in that memory loads the event, looks, and waits for the next signal if it is not
 * there; who has stored it signals. */

/* Load an event; what was stored before the signals it counts is visible after this call. */
uint32_t gn_event_load(const uint32_t* event);

/* Count a signal and wake all who wait. Does not block. -ENOSYS: no such system call here. */
int32_t gn_event_signal(uint32_t* event);

/* Block while the event is `seen`, at most timeout_ns (negative: without limit). 0: it changed, or a signal
 * of the system came, or nothing did: look again. -ETIMEDOUT: time is up. -ENOSYS: no such system call. */
int32_t gn_event_wait(const uint32_t* event, uint32_t seen, int64_t timeout_ns);

/* ------------------------------------------------------------------ checksums */

enum gn_crc_method {
    GN_CRC_AUTO = 0,       /* the fastest one this processor has */
    GN_CRC_PORTABLE = 1,   /* plain C++, present everywhere */
    GN_CRC_INSTRUCTION = 2 /* the processor's own instruction: SSE4.2, or ARMv8 CRC */
};

/* Continue the CRC-32C (RFC 3720) *crc over `nbytes` bytes; start with 0. All methods give the same value.
 * Blocking, single thread. -EINVAL: unknown method, negative count; -ENOTSUP: the processor or the build
 * lacks the method. */
int32_t gn_crc32c(uint32_t* crc, const void* data, int64_t nbytes, int32_t method);

/* ------------------------------------------------------------------ asynchronous file I/O */

enum gn_io_backend {
    GN_IO_URING = 1,  /* io_uring */
    GN_IO_AIO = 2,    /* Linux native AIO (io_submit) */
    GN_IO_THREADS = 3 /* pread/pwrite in threads; works everywhere */
};

enum gn_io_op { GN_IO_READ = 0, GN_IO_WRITE = 1 };

enum gn_io_open_flag {
    GN_IO_OPEN_READ = 1,
    GN_IO_OPEN_WRITE = 2,
    GN_IO_OPEN_CREATE = 4,
    GN_IO_OPEN_TRUNCATE = 8,
    GN_IO_OPEN_DIRECT = 16 /* use O_DIRECT for aligned requests if the file system takes it */
};

/* One engine: a queue to the kernel and the files opened through it. */
typedef struct gn_io gn_io;

/* What became of a request. */
typedef struct gn_io_result {
    int32_t status; /* 0, or -errno (reading past the end of the file is -ENODATA; see gn_io_verify) */
    int32_t file;
    int32_t op;
    int64_t offset;      /* of the request */
    int64_t nbytes;      /* asked for */
    int64_t nbytes_done; /* transferred before the error */
} gn_io_result;

typedef struct gn_io_request {
    int32_t file; /* from gn_io_open */
    int32_t op;   /* gn_io_op */
    void* buffer; /* must stay valid, and for a read untouched, until the ticket has completed */
    int64_t nbytes;
    int64_t offset;
} gn_io_request;

/* 0 if `backend` works on this machine now, else why not (-ENOSYS, -EPERM, ...). */
int32_t gn_io_probe(int32_t backend);

/* Start an engine with at most `queue_depth` kernel requests in flight (1..4096). GN_IO_THREADS uses
 * `num_threads` threads, the others ignore it. */
int32_t gn_io_create(gn_io** io, int32_t backend, int32_t queue_depth, int32_t num_threads);

/* Complete what the kernel already has, cancel the rest (-ECANCELED), close the files, free.
 * NULL is allowed. */
int32_t gn_io_destroy(gn_io* io);

/* Open `path`; returns a file number >= 0 or -errno. With GN_IO_OPEN_DIRECT requests whose offset,
 * length and buffer are all multiples of 4096 go through O_DIRECT, all others through the page cache;
 * where the file system refuses O_DIRECT everything goes through the page cache and
 * gn_io_is_direct says so. Created files get mode 0600. */
int32_t gn_io_open(gn_io* io, const char* path, int32_t flags);
int32_t gn_io_is_direct(gn_io* io, int32_t file); /* 1, 0 or -EBADF */
int32_t gn_io_close(gn_io* io, int32_t file);     /* -EBUSY while requests are in flight */
int32_t gn_io_sync(gn_io* io, int32_t file);      /* fdatasync; blocking */

/* From now on keep a CRC-32C of each whole block of 4096 bytes that is written to the first `nbytes` bytes of
 * the file through this number, and compare each whole block that is read with what was last written there: a
 * read that differs fails with -EBADMSG, and `nbytes_done` counts the bytes before the first such block.
 * Blocks never written, or last written in part, are not compared. Takes 4 bytes of memory for a block; the
 * work is done by a thread of the engine, before a write is given to the kernel and after a read has come
 * back. -EINVAL: nbytes is negative; -EBADF; -EBUSY: requests are in flight. */
int32_t gn_io_verify(gn_io* io, int32_t file, int64_t nbytes);

/* Queue `count` requests as one batch; writes one ticket (never 0) per request. Never waits for the device:
 * requests beyond the queue depth wait inside the engine. Requests longer than 1 GiB are split and short
 * transfers are continued, so a ticket completes when every byte has moved or an error ended it.
 * Requests of different tickets may complete in any order, even on the same bytes.
 * -EINVAL / -EBADF: a request is malformed; then none of the batch was queued. */
int32_t gn_io_submit(gn_io* io, const gn_io_request* requests, int64_t count, uint64_t* tickets);

/* Wait for a ticket as gn_pool_wait does. Returns the request's status; `result`, if not NULL, is
 * filled once the request has completed. A ticket that completed without error may be asked again. */
int32_t gn_io_wait(gn_io* io, uint64_t ticket, int64_t timeout_ns, gn_io_result* result);

/* As gn_pool_keep_spans and gn_pool_take_spans, for requests. */
int32_t gn_io_keep_spans(gn_io* io, int64_t capacity);
int64_t gn_io_take_spans(gn_io* io, gn_span* spans, int64_t max_count);

/* Bytes moved since creation. */
int32_t gn_io_stats(gn_io* io, int64_t* nbytes_read, int64_t* nbytes_written);

/* CDEF-END */

#ifdef __cplusplus
}
#endif

#endif /* GEMINI_NATIVE_H */
