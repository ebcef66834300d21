/* SPDX-License-Identifier: Apache-2.0
 * The plugin ABI of Driftstone, major 1. C11 and C++20; LP64, little-endian. This header and
 * ds/parallel.h are all that a plugin needs; ds/plugin.hpp is a C++20 layer over it. README.md
 * beside it shows how to write a plugin; `ds-plugin-check` judges one.
 *
 * Growth (tests/abi checks it):
 *  R1 A struct that begins with `size` grows only at its end. Its writer sets `size` to the bytes
 *     it filled in; a reader looks at no field beyond. A field out of sight counts as zero, so zero
 *     always means "as it was before this field existed". Test with DS_SEES / DS_HAS. An output
 *     struct comes with `size` = the room in it; who fills it writes no further and sets `size` to
 *     what it wrote.
 *  R2 A struct without `size` never changes. Only those stand in arrays by value.
 *  R3 A function that may be missing is NULL or out of sight.
 *  R4 New behaviour gets a new field or a new interface id; the meaning of an old one stays.
 *  R5 No exception, longjmp or signal crosses this boundary, and no C++ type.
 *  R6 Who allocates frees. What is passed in is borrowed for the call unless it says otherwise.
 *  R7 No implicit padding (-Wpadded -Werror): a field in tail padding would not change `size`.
 *
 * Threads, per function:
 *  [load]   the host's loader, one call at a time per file
 *  [any]    from any thread, concurrently
 *  [serial] never two calls at once on one instance; different instances may overlap. With
 *           DS_CAP_REENTRANT also these may overlap, except create, destroy, reconfigure, restore.
 *  [hot]    as [serial], and besides: no allocation, lock wait, file, network, and no waiting for a
 *           device: device work is only enqueued on call->stream.
 *
 * Shapes are written [rows, columns]; the last dimension is contiguous unless said otherwise.
 * Every function that returns ds_code fills *st when it fails: say what, which, got and expected.
 * After DS_E_* the outputs are undefined and the host goes on without them. */
#ifndef DS_PLUGIN_H
#define DS_PLUGIN_H
#include <stddef.h>
#include <stdint.h>

#include "ds/parallel.h"

#define DS_ABI_MAJOR 1u
#define DS_ABI_MINOR 1u
#define DS_ENTRY_NAME "ds_plugin_entry_v1" /* the major is in the name: v1 and v2 can coexist */
#define DS_EXPORT __attribute__((visibility("default")))
#ifdef __cplusplus
#define DS_SIZE_TO(T, f) (offsetof(T, f) + sizeof(static_cast<T*>(nullptr)->f))
extern "C" {
#else
#define DS_SIZE_TO(T, f) (offsetof(T, f) + sizeof(((T*)0)->f))
#endif
#define DS_SEES(T, p, f) ((p) && (p)->size >= DS_SIZE_TO(T, f)) /* is the field there? */
#define DS_HAS(T, p, f) (DS_SEES(T, p, f) && (p)->f)            /* ... and neither NULL nor 0? */

/* ---- 1. Basic types -------------------------------------------------------------------------- */

typedef struct ds_str {
  const char* ptr;
  uint64_t len;
} ds_str; /* UTF-8, need not end in NUL */

typedef int32_t ds_code;
enum {
  DS_OK = 0,
  DS_E_ARG = 1,   /* an argument makes no sense */
  DS_E_SHAPE = 2, /* a tensor's shape, stride or size does not fit */
  DS_E_DTYPE = 3,
  DS_E_DEVICE = 4,
  DS_E_UNSUPPORTED = 5, /* well-formed, but this plugin does not do it */
  DS_E_NOMEM = 6,
  DS_E_BUSY = 7,
  DS_E_DEADLINE = 8,
  DS_E_CANCELLED = 9,
  DS_E_CONFIG = 10,
  DS_E_STATE = 11,   /* called out of order, or a saved state does not fit */
  DS_E_DATA = 12,    /* the media, text or state bytes are broken */
  DS_E_NUMERIC = 13, /* NaN or infinity where none may be */
  DS_E_VERSION = 14,
  DS_E_INTERNAL = 15
};
enum {
  DS_ST_RETRYABLE = 1,
  DS_ST_POISONED = 2
}; /* ds_status.flags; poisoned: destroy the instance */
/* On the caller's stack: an error needs no heap, cannot leak and can be copied between processes.
 */
typedef struct ds_status {
  ds_code code;
  int32_t native; /* errno, cudaError_t ...; 0 = none */
  uint32_t flags;
  uint32_t len; /* bytes of text, at most 240; not NUL-terminated */
  char text[240];
} ds_status;

enum { DS_DEV_CPU = 1, DS_DEV_CUDA = 2, DS_DEV_CUDA_HOST = 3 }; /* as in DLPack */
typedef struct ds_device {
  int32_t type;
  int32_t index;
} ds_device;

enum {
  DS_INT = 0,
  DS_UINT = 1,
  DS_FLOAT = 2,
  DS_BFLOAT = 4,
  DS_BOOL = 6,
  DS_F8_E4M3FN = 10,
  DS_F8_E5M2 = 12
};
typedef struct ds_dtype {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} ds_dtype; /* as in DLPack */

enum { DS_T_READONLY = 1, DS_T_ALIGNED64 = 2 }; /* ds_tensor.flags */
/* ds_tensor.packing. Panels of 16 rows, zero-padded at the end; of a matrix [n, k]:
 *   DS_PACK_PANEL_F32   [ceil(n/16)][k][16]             float
 *   DS_PACK_PANEL_BF16  [ceil(n/16)][ceil(k/2)][16][2]  bfloat16, neighbouring k together
 * From 0x10000 on: a quantizer's own layouts (ds_qformat.layout_id). */
enum { DS_PACK_NONE = 0, DS_PACK_PANEL_F32 = 1, DS_PACK_PANEL_BF16 = 2, DS_PACK_OWN = 0x10000 };
/* A borrowed view. The first 48 bytes are DLTensor's, field for field; `bytes` bounds the buffer
 * from `data` on, and strides (in elements) are never NULL unless ndim is 0. A packed tensor's
 * shape is the matrix's, its strides are undefined. */
typedef struct ds_tensor {
  void* data;
  ds_device device;
  int32_t ndim;
  ds_dtype dtype;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
  uint64_t bytes;
  uint32_t flags;
  uint32_t packing;
  uint64_t reserved[2];
} ds_tensor;

enum { DS_STREAM_CAPTURING = 1 };
typedef struct ds_stream {
  uint32_t size;
  uint32_t flags;
  ds_device device;
  void* native; /* cudaStream_t */
} ds_stream;

/* Goes with every call that computes. While a graph is captured (DS_STREAM_CAPTURING) scalars in
 * the arguments are upper bounds, and kernels read lengths, tables, seed and step from device
 * memory. */
typedef struct ds_call {
  uint32_t size;
  uint32_t flags;
  const ds_parallel* parallel; /* CPU: the host's pool; never NULL */
  const ds_stream* stream;     /* CUDA: where to enqueue; NULL on the CPU */
  void* workspace;             /* 64-byte aligned; what is in it is undefined */
  uint64_t workspace_bytes;    /* at least what plan asked for */
  const uint32_t* cancel;      /* read atomically; not 0 = stop soon with DS_E_CANCELLED; or NULL */
  int64_t deadline_ns;         /* CLOCK_MONOTONIC; 0 = none; past = DS_E_DEADLINE */
  uint64_t seed;               /* the only randomness allowed */
  uint64_t step;
  const uint64_t* device_seed_step; /* CUDA: {seed, step} for kernels; NULL on the CPU */
  uint64_t request_id;
  uint64_t generation; /* of the weights, for logs */
} ds_call;

typedef struct ds_sink { /* returns DS_OK, else the writer stops and returns that code */
  uint32_t size;
  uint32_t flags;
  void* ctx;
  ds_code (*write)(void* ctx, const void* bytes, uint64_t n);
} ds_sink;
typedef struct ds_source { /* *got == 0 is the end */
  uint32_t size;
  uint32_t flags;
  void* ctx;
  ds_code (*read)(void* ctx, void* bytes, uint64_t n, uint64_t* got);
} ds_source;

/* ---- 2. What the host offers ----------------------------------------------------------------- */

typedef struct ds_config ds_config; /* valid against the component's schema; lives until the next
                                       reconfigure of the instance or its destroy has returned */
enum { DS_LOG_TRACE = 0, DS_LOG_DEBUG = 1, DS_LOG_INFO = 2, DS_LOG_WARN = 3, DS_LOG_ERROR = 4 };
/* Outlives every instance. `ctx` is the first argument of its functions. A host may leave out any
 * function: the plugin then goes without. */
typedef struct ds_host {
  uint32_t size;
  uint32_t abi_minor;
  void* ctx;
  ds_str name, version;
  const void* (*get_interface)(void* ctx, ds_str id);                   /* [any] NULL = no */
  int32_t (*log_enabled)(void* ctx, int32_t level);                     /* [any] [hot] */
  void (*log)(void* ctx, int32_t level, ds_str component, ds_str text); /* [any] */
  ds_code (*alloc)(void* ctx, ds_device device, uint64_t bytes, uint64_t align,
                   void** out);                                          /* [any] */
  void (*dealloc)(void* ctx, ds_device device, void* p, uint64_t bytes); /* [any] */
  void (*thread_enter)(void* ctx,
                       ds_str name); /* each thread that a plugin starts says so, and ... */
  void (*thread_leave)(void* ctx);   /* ... when it ends: retiring waits for all of them */
  void (*metric)(void* ctx, ds_str name, double value, int32_t is_counter); /* [any] */
  /* By path ("window", "model.path"). DS_E_CONFIG: neither set nor a default; *out is untouched. */
  ds_code (*config_int)(const ds_config*, const char* path, int64_t* out);   /* [any] */
  ds_code (*config_number)(const ds_config*, const char* path, double* out); /* [any] */
  ds_code (*config_text)(const ds_config*, const char* path, ds_str* out);   /* [any] */
  ds_str (*config_json)(const ds_config*);                                   /* [any] all of it */
} ds_host;

/* ---- 3. What a plugin offers ----------------------------------------------------------------- */

typedef struct ds_instance ds_instance; /* the plugin's own */
enum {
  DS_KIND_ENCODER = 1,
  DS_KIND_ATTENTION = 2,
  DS_KIND_QUANTIZER = 3,
  DS_KIND_LEARNER = 4,
  DS_KIND_CURRICULUM = 5,
  DS_KIND_RETRIEVER = 6,
  DS_KIND_TOOL = 7
};
enum {
  DS_CAP_CPU = 1,
  DS_CAP_CUDA = 2,
  DS_CAP_REENTRANT = 4,
  DS_CAP_GRAPH_SAFE = 8,
  DS_CAP_DETERMINISTIC =
      16,                /* equal arguments and seed give equal bytes, on any number of threads */
  DS_CAP_TRAINABLE = 32, /* has ds_instance_ops.parameters */
  DS_CAP_STATEFUL = 64,  /* has save and restore */
  DS_CAP_OUT_OF_PROCESS = 128 /* may run in a helper process: keeps no pointer of a call */
};

/* A trainable tensor of the plugin, FP32 and contiguous, in memory of the plugin that stays where
 * it is. Calls that differentiate add to `gradient`; the optimizer reads it, writes `value`, clears
 * it. */
typedef struct ds_parameter {
  uint32_t size;
  uint32_t flags;
  ds_str name; /* unique in the instance, e.g. "gate.weight" */
  const ds_tensor* value;
  const ds_tensor* gradient;
} ds_parameter;

typedef struct ds_instance_ops { /* the same for all kinds; only destroy is required */
  uint32_t size;
  uint32_t flags;
  void (*destroy)(ds_instance*);                                      /* [serial] the last call */
  ds_code (*health)(ds_instance*, ds_status*);                        /* [any] at most 1 ms */
  ds_code (*reconfigure)(ds_instance*, const ds_config*, ds_status*); /* [serial] only keys that
                                                  the schema marks "x-ds-live" have changed */
  ds_code (*save)(ds_instance*, const ds_sink*, ds_status*);          /* [serial] */
  ds_code (*restore)(ds_instance*, const ds_source*, ds_str saved_by_version,
                     ds_status*);                                  /* [serial] */
  ds_code (*stats)(ds_instance*, const ds_sink* json, ds_status*); /* [any] one JSON object */
  ds_code (*parameters)(ds_instance*, const ds_parameter* const** out, uint32_t* n,
                        ds_status*);                       /* [serial] */
  ds_code (*parameters_changed)(ds_instance*, ds_status*); /* [serial] by the optimizer */
} ds_instance_ops;

typedef struct ds_component {
  uint32_t size;
  uint32_t kind;
  ds_str name;          /* what settings and commands say: "window-global", "int8" */
  ds_str summary;       /* one line */
  ds_str config_schema; /* JSON Schema of an object; empty = no keys. "x-ds-live": true marks live
                           ones */
  uint64_t caps;
  uint32_t min_sm;         /* 90 = sm_90; 0 = any */
  uint32_t min_host_minor; /* of the ABI */
  ds_code (*create)(const ds_host*, const ds_config*, ds_device, ds_instance** out,
                    ds_status*); /* [load] */
  const ds_instance_ops* ops;
  const void* table; /* ds_encoder ... ds_tool, by `kind` */
  const void* (*get_interface)(ds_instance*,
                               ds_str id); /* [any] extras; NULL function or result = none */
} ds_component;

typedef struct ds_plugin { /* static storage */
  uint32_t size;
  uint32_t abi_minor;                  /* DS_ABI_MINOR when it was compiled */
  ds_str id, version, vendor, license; /* id: reverse domain, "org.acme.nf4"; version: "1.2.0" */
  uint32_t component_count;
  uint32_t flags;
  const ds_component* const* components;
  void (*retire)(void); /* [load] or NULL: the last call into the file, all instances are gone */
} ds_plugin;

/* The one exported symbol. [load] Repeatable and without side effects, so that a scan is cheap.
 * Both sides then speak the lower of the two minors. DS_E_VERSION = this host is too old for me. */
typedef ds_code (*ds_plugin_entry_fn)(const ds_host* host, const ds_plugin** out, ds_status* st);
DS_EXPORT ds_code ds_plugin_entry_v1(const ds_host* host, const ds_plugin** out, ds_status* st);

/* The ELF note in section .note.driftstone (owner "Driftstone", type 1): what lets a host judge the
 * file without running any of it. Agrees with the descriptor. */
enum { DS_CPU_AVX2 = 1, DS_CPU_AVX512 = 2, DS_CPU_AVX512_BF16 = 4, DS_CPU_AMX_BF16 = 8 };
typedef struct ds_note {
  uint32_t namesz, descsz, type; /* 11, 112, 1 */
  char name[12];
  uint32_t abi_major, abi_minor;
  uint32_t kinds_mask;   /* bit (1 << DS_KIND_x) */
  uint32_t cpu_features; /* DS_CPU_x that the code needs everywhere, not where it dispatches */
  char id[96];
} ds_note;

/* The instruction sets that the compiler may use everywhere in this file, as DS_CPU_x. */
#ifdef __AVX2__
#define DS_BUILT_AVX2 DS_CPU_AVX2
#else
#define DS_BUILT_AVX2 0
#endif
#ifdef __AVX512F__
#define DS_BUILT_AVX512 DS_CPU_AVX512
#else
#define DS_BUILT_AVX512 0
#endif
#ifdef __AVX512BF16__
#define DS_BUILT_AVX512_BF16 DS_CPU_AVX512_BF16
#else
#define DS_BUILT_AVX512_BF16 0
#endif
#ifdef __AMX_BF16__
#define DS_BUILT_AMX_BF16 DS_CPU_AMX_BF16
#else
#define DS_BUILT_AMX_BF16 0
#endif
#define DS_CPU_BUILT_FOR \
  (DS_BUILT_AVX2 | DS_BUILT_AVX512 | DS_BUILT_AVX512_BF16 | DS_BUILT_AMX_BF16)
/* The note of a plugin in C, once in a file: DS_NOTE("org.acme.nf4", 1u << DS_KIND_QUANTIZER);
 * DS_PLUGIN of ds/plugin.hpp writes it for C++. The id is at most 95 bytes. */
#define DS_NOTE(ID, KINDS)                                                                         \
  __attribute__((section(".note.driftstone"), used, aligned(4))) static const ds_note ds_note_ = { \
      11,      sizeof(ds_note) - 24, 1, "Driftstone", DS_ABI_MAJOR, DS_ABI_MINOR,                  \
      (KINDS), DS_CPU_BUILT_FOR,     ID}

/* What plan() answers. Pure: looks at shapes only. The host allocates, then runs. */
typedef struct ds_plan {
  uint32_t size;
  uint32_t flags;
  uint64_t workspace_bytes;  /* of ds_call, at least while one call runs */
  uint64_t saved_bytes;      /* from forward to backward, owned by the host */
  uint64_t page_extra_bytes; /* attention: plugin state beside each KV page of a layer */
  uint64_t prepared_bytes;   /* quantizer: the shared input in the plugin's form */
  int64_t shape[4];          /* encoder: of the output, [tokens, width, 0, 0] */
} ds_plan;

#include "ds/plugin_kinds.h"

#ifdef __cplusplus
}
#define DS_LAYOUT(c) static_assert(c, "Driftstone ABI layout")
#else
#define DS_LAYOUT(c) _Static_assert(c, "Driftstone ABI layout")
#endif
DS_LAYOUT(sizeof(void*) == 8 && sizeof(ds_tensor) == 80 && offsetof(ds_tensor, byte_offset) == 40);
DS_LAYOUT(sizeof(ds_status) == 256 && sizeof(ds_dtype) == 4 && sizeof(ds_str) == 16);
DS_LAYOUT(sizeof(ds_note) == 136 && sizeof(ds_device) == 8);
#endif /* DS_PLUGIN_H */
