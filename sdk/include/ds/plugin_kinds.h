/* SPDX-License-Identifier: Apache-2.0
 * Part of ds/plugin.h: the tables of the seven kinds. T = rows of a call (tokens), B = sequences,
 * Hq / Hkv = query and key heads, D = head size, P = pages. Activations are FP32. Functions marked
 * "opt." may be NULL. */
#ifndef DS_PLUGIN_KINDS_H
#define DS_PLUGIN_KINDS_H
#ifndef DS_PLUGIN_H
#error "include ds/plugin.h"
#endif

/* ---- Encoder: media to embeddings ------------------------------------------------------------ */

enum { DS_MOD_TEXT = 1, DS_MOD_IMAGE = 2, DS_MOD_AUDIO = 3, DS_MOD_VIDEO = 4 };
typedef struct ds_media {
  uint32_t size;
  uint32_t modality;
  const ds_tensor*
      data;       /* TEXT i32 [tokens] ids, of several sequences maybe: a token's output depends on
                     its own id alone · IMAGE u8 [height, width, channels] · AUDIO f32
                     [samples, channels] in -1..1 · VIDEO u8 [frames, height, width, channels] */
  double rate;    /* AUDIO Hz, VIDEO frames per second, else 0 */
  double start_s; /* where it begins in a longer stream */
  float weight;   /* the task's weight of this modality: the output is multiplied by it; 0 = 1 */
  uint32_t flags;
} ds_media;

enum { DS_ENCODE_TRAIN = 1 }; /* ds_encode_args.flags: keep in `saved` what backward needs */
typedef struct ds_encode_args {
  uint32_t size;
  uint32_t flags;
  const ds_media* media;
  const ds_tensor* const*
      tensors;           /* [tensor_count] of ds_encoder, as the host has them: maybe packed */
  const ds_tensor* out;  /* f32 [tokens, width]: written */
  void* saved;           /* plan.saved_bytes when training */
  const ds_tensor* dout; /* backward: gradient of out */
  const ds_tensor* const*
      dtensors; /* backward: f32 [tensor_count], added to; an entry may be NULL */
} ds_encode_args;

typedef struct ds_encoder {
  uint32_t size;
  uint32_t modalities;        /* bit (1 << DS_MOD_x) */
  const ds_str* tensor_names; /* tensors of the model that it reads, "model.embed_tokens.weight" */
  uint32_t tensor_count;
  uint32_t reserved;
  /* [any] Tokens and width for this media (pure). `out` is not there yet; of `tensors` only the
   * shapes count, their data may be missing. */
  ds_code (*plan)(ds_instance*, const ds_encode_args*, ds_plan*, ds_status*);
  ds_code (*encode)(ds_instance*, const ds_call*, const ds_encode_args*, ds_status*); /* [hot] */
  ds_code (*backward)(ds_instance*, const ds_call*, const ds_encode_args*,
                      ds_status*); /* [hot] opt. */
} ds_encoder;

/* ---- Attention ------------------------------------------------------------------------------- */

/* The paged cache of one layer. The host has already rotated and stored the keys of this call. The
 * dtype is the tensors'; scales are NULL unless the cache is quantized. */
typedef struct ds_kv_view {
  uint32_t size;
  uint32_t page_tokens;     /* 32 */
  const ds_tensor* k_pages; /* [P, Hkv, page_tokens, D] */
  const ds_tensor* v_pages; /* the same */
  const ds_tensor* k_scale; /* f32 [P, Hkv, page_tokens] or NULL */
  const ds_tensor* v_scale;
  const ds_tensor*
      block_table;          /* i32 [B, pages]: page ids of each sequence, in order of position */
  const ds_tensor* lengths; /* i32 [B]: keys of each sequence, those of this call included */
  const ds_tensor*
      page_extra; /* u8 [P, page_extra_bytes] or NULL: lives, is copied and is dropped
                     with the page; zero when the page is new; its rows may be further apart */
} ds_kv_view;

/* ds_train_view.flags: products may round their operands to BF16; or those of the forward pass to
 * FP16, those of the backward pass to BF16. Sums stay FP32. */
enum { DS_TRAIN_ROUND_BF16 = 1, DS_TRAIN_ROUND_FP16 = 2 };
/* Training: sequences packed by rows; sequence b may stand behind a frozen prefix, whose keys all
 * its rows see and which get no gradient. */
typedef struct ds_train_view {
  uint32_t size;
  uint32_t flags;     /* DS_TRAIN_x */
  const ds_tensor* k; /* f32 [T, Hkv, D], rotated */
  const ds_tensor* v;
  const ds_tensor* const*
      prefix_k; /* [B], each f32 [tokens, Hkv, D] or NULL; or NULL: none has one */
  const ds_tensor* const* prefix_v;
} ds_train_view;

/* Exactly one of kv (serving) and train is there. Row r of sequence b is its token at position
 * lengths[b] - rows(b) + r (serving) or prefix(b) + r (training), and may use keys up to its own
 * position and no other. On the CPU the bits of a row depend on its own sequence up to it, never on
 * the other rows of the call or on how the sequence was cut into calls. */
typedef struct ds_attn_args {
  uint32_t size;
  uint32_t flags;
  uint32_t batch, layer;
  uint32_t max_rows, max_keys; /* of a sequence in this call: bounds for plan */
  const ds_tensor* q;          /* f32 [T, Hq, D], rotated */
  const ds_tensor* rows;       /* i32 [B + 1]: sequence b has the rows rows[b] .. rows[b + 1];
                                  with `train` always in host memory */
  const ds_kv_view* kv;
  const ds_train_view* train;
  const ds_tensor* out;        /* f32 [T, Hq, D] written; in backward read */
  const ds_tensor* lse;        /* f32 [T, Hq] or NULL: log of the softmax's sum; in backward read */
  float scale;                 /* of q . k */
  float softcap;               /* 0 = none, else s -> softcap * tanh(s / softcap) */
  const ds_tensor* global_idx; /* i32 [B, n] or NULL: positions seen by all rows from then on, in
                                  place of the plugin's own choice; -1 = unused */
  const ds_tensor* dout;       /* backward from here on: f32 [T, Hq, D] */
  const ds_tensor* dq;         /* overwritten */
  const ds_tensor* dk;         /* f32 [T, Hkv, D] overwritten */
  const ds_tensor* dv;
  void* saved; /* plan.saved_bytes, written by prefill with `train`, read by backward.
                  NULL in prefill: keep nothing. The host may drop it and call prefill
                  again, which then gives equal bits. */
  /* 1.1: with DS_ATTENTION_OUT_16, serving on a GPU: f16 or bf16 [T, Hq, D], Hq * D a multiple of 8,
   * or NULL. Written in place of out, which is room for whatever then. */
  const ds_tensor* out_16;
} ds_attn_args;

/* ds_attention.flags, 1.1: prefill and decode leave what the next product reads, rounded as it
 * multiplies, where they are asked to. */
enum { DS_ATTENTION_OUT_16 = 1 };

typedef struct ds_attention {
  uint32_t size;
  uint32_t flags; /* DS_ATTENTION_x */
  ds_code (*plan)(ds_instance*, const ds_attn_args*, ds_plan*, ds_status*);          /* [any] */
  ds_code (*prefill)(ds_instance*, const ds_call*, const ds_attn_args*, ds_status*); /* [hot] */
  /* [hot] opt. The same where each sequence has one row. */
  ds_code (*decode)(ds_instance*, const ds_call*, const ds_attn_args*, ds_status*);
  /* [hot] opt. Without it the model is frozen below the attention while it trains. */
  ds_code (*backward)(ds_instance*, const ds_call*, const ds_attn_args*, ds_status*);
  /* [any] opt. read u8 [T, Hq, keys]: 1 where the row's result used the key at that position. */
  ds_code (*explain)(ds_instance*, const ds_call*, const ds_attn_args*, const ds_tensor* read,
                     ds_status*);
} ds_attention;

/* ---- Quantizer of weights -------------------------------------------------------------------- */

enum {
  DS_LINEAR_RESIDUAL = 1,
  DS_LINEAR_SWIGLU = 2,
  DS_LINEAR_LORA = 4,
  DS_LINEAR_BIAS = 8,
  DS_LINEAR_NORM = 16, /* this and ROPE: on a GPU, of calls of at most DS_LINEAR_FEW_ROWS rows */
  DS_LINEAR_ROPE = 32,
  DS_LINEAR_TABLE = 64, /* 1.1: with LORA, on a GPU: where there is a table, linear reads it alone */
  DS_LINEAR_FEW_ROWS = 8
};
typedef struct ds_qformat {
  uint32_t size;
  uint32_t layout_id; /* >= DS_PACK_OWN; the same number = the same bytes, in every version */
  uint32_t bits;      /* of a weight, without scales */
  uint32_t group;     /* weights along k that share a scale; 0 = a whole row */
  ds_dtype scale_dtype;
  uint32_t symmetric;
  uint64_t packed_bytes; /* of [n, k]; may be 0 for none */
  uint64_t scale_bytes;
  uint64_t zero_bytes;
  float rel_tol;  /* promise: max |w - dequantize(quantize(w))| <= rel_tol * max |w| of its row */
  uint32_t fused; /* DS_LINEAR_x that linear() does itself; the host does the others */
} ds_qformat;

/* One weight matrix W [n, k] (y = W x) in memory of the host, 64-byte aligned. A copy of it in a
 * GPU's memory comes with the calls that have a stream: linear and dequantize. */
typedef struct ds_qweight {
  uint32_t size;
  uint32_t flags;
  int64_t n, k;
  const ds_qformat* format;
  void* packed;
  void* scales;
  void* zeros;
} ds_qweight;

/* y += scale * B (A x). Packed panels (DS_PACK_PANEL_x), rank padded to 16 with zeros. */
typedef struct ds_lora_pair {
  uint32_t size;
  float scale;
  const ds_tensor* a; /* [16, k]; NULL: this weight has none in this slot */
  const ds_tensor* b; /* [n, 16] */
} ds_lora_pair;
/* A pair in a table, in the memory of a GPU: rows of A [16, k] and B [n, 16], each padded with
 * zeros to whole 16 bytes. */
typedef struct ds_lora_entry {
  const void* a; /* NULL: none */
  const void* b;
  float scale;
  uint32_t reserved;
} ds_lora_entry;
typedef struct ds_lora_slots {
  uint32_t size;
  uint32_t n_slots;                 /* at most 8: versions that share the batch */
  const int32_t* slot_of_row;       /* [rows]; -1 = base only */
  const ds_lora_pair* const* pairs; /* [n_slots][n_weights] */
  float* t;                         /* [n_weights][rows][16] written: A x of each row */
  /* 1.1: [n_weights][8] in the memory of the device, or NULL. What is in pairs again when the call
   * is made; by the time that a recording of it runs, other pairs may be there. Without
   * DS_LINEAR_TABLE the host records such calls anew for other pairs. */
  const ds_lora_entry* table;
  ds_dtype table_dtype; /* of the factors in it */
  uint32_t reserved;
} ds_lora_slots;

/* The outputs are q, k and v [rows, heads * D] of a serving step. q and k turn by their position
 * (by halves); q goes to y[0], k and v to their pages alone. */
typedef struct ds_linear_rope {
  uint32_t size;
  uint32_t heads, kv_heads, head_dim;
  const float* cos; /* [positions, D / 2] */
  const float* sin;
  const int32_t* positions; /* [rows] */
  const int32_t* slots;     /* [rows]: page * 32 + place in it */
  void* k_pages;            /* [P, Hkv, 32, D] */
  void* v_pages;
  ds_dtype kv_dtype;
  uint32_t reserved;
} ds_linear_rope;

typedef struct ds_linear_args {
  uint32_t size;
  uint32_t epilogue; /* 0, DS_LINEAR_RESIDUAL or DS_LINEAR_SWIGLU */
  int64_t rows;
  const float* x;                   /* [rows, k] */
  int64_t x_stride;                 /* elements from row to row */
  const void* x_prepared;           /* from prepare(); NULL if plan.prepared_bytes was 0 */
  const ds_qweight* const* weights; /* [n_weights], all with the same k and format */
  const float* const* bias;         /* [n_weights], each [n] or NULL */
  float* const* y;                  /* [n_weights] [rows, n]; SWIGLU: only y[0] */
  const int64_t* y_stride;          /* [n_weights] elements from row to row */
  const float* residual;            /* RESIDUAL: y0 = residual + W0 x; like y[0], may be y[0] */
  const ds_lora_slots* lora;        /* or NULL */
  uint32_t n_weights;               /* 1..3. SWIGLU: 2, y0 = silu(W0 x) * (W1 x) */
  uint32_t reserved;
  const float* norm;          /* f32 [k] or NULL: x = RMSNorm of x with this weight, and was not
                                 prepared */
  const ds_linear_rope* rope; /* or NULL; then y[1] and y[2] may be NULL */
  float norm_eps;
  uint32_t reserved1;
} ds_linear_args;

/* The weights of a model, once at load: format, then quantize each. Without linear the host serves
 * what dequantize gives. On the CPU the bits of a row of linear do not depend on how many rows go
 * with it. format, observe and quantize are called with memory of the host, whatever the device. */
typedef struct ds_quantizer {
  uint32_t size;
  uint32_t flags;
  ds_code (*format)(ds_instance*, int64_t n, int64_t k, ds_qformat* out, ds_status*); /* [any] */
  /* [serial] opt. Calibration: inputs x f32 [T, k] of the weight `name` (HF path), in any number of
   * calls. The next quantize of that name makes use of them, then they are forgotten; rel_tol is a
   * promise for weights without. */
  ds_code (*observe)(ds_instance*, const ds_call*, ds_str name, const ds_tensor* x, ds_status*);
  /* [serial] w f32 [n, k] into the memory of out. DS_E_NUMERIC if w holds NaN or infinity. */
  ds_code (*quantize)(ds_instance*, const ds_call*, ds_str name, const ds_tensor* w,
                      const ds_qweight* out, ds_status*);
  ds_code (*dequantize)(ds_instance*, const ds_call*, const ds_qweight*, const ds_tensor* w,
                        ds_status*);
  /* [any] opt. prepared_bytes and workspace for up to `rows` rows. */
  ds_code (*plan)(ds_instance*, const ds_qformat*, int64_t rows, int64_t k, ds_plan*, ds_status*);
  /* [hot] opt. The shared input of several weights, once: x [rows, k], stride in elements. */
  ds_code (*prepare)(ds_instance*, const ds_call*, const ds_qformat*, int64_t rows, int64_t k,
                     const float* x, int64_t x_stride, void* prepared, ds_status*);
  ds_code (*linear)(ds_instance*, const ds_call*, const ds_linear_args*,
                    ds_status*); /* [hot] opt. */
  /* [hot] opt. Quantization-aware training: wq = what dequantize(quantize(w)) would give; w, wq
   * f32. */
  ds_code (*fake_quant)(ds_instance*, const ds_call*, const ds_tensor* w, const ds_tensor* wq,
                        ds_status*);
  /* [hot] opt. dw += dwq passed back through fake_quant (its own estimator). */
  ds_code (*fake_quant_backward)(ds_instance*, const ds_call*, const ds_tensor* w,
                                 const ds_tensor* dwq, const ds_tensor* dw, ds_status*);
} ds_quantizer;

/* ---- Learner: what a training step draws, weighs and does with the gradient ------------------ */

enum { DS_POOL_FRESH = 0, DS_POOL_REPLAY = 1, DS_POOL_ANCHOR = 2, DS_POOL_CONTRAST = 3 };
enum {
  DS_SAMPLE_SEEN = 1,      /* loss or kl is known */
  DS_SAMPLE_LEARNED = 2,   /* it meets the stop rule */
  DS_SAMPLE_PAIR = 4,      /* has a rejected answer */
  DS_SAMPLE_PREFERENCE = 8 /* the pair is all that was said: nobody called its answer right */
};
/* Something that can be drawn. FRESH: the round's items. REPLAY: earlier ones. ANCHOR: everyday
 * prompts with the base's own answers. CONTRAST: an item's question and answer with another entity;
 * owner = the item's key. */
typedef struct ds_sample {
  uint64_t key; /* stable across runs */
  uint64_t owner;
  uint32_t pool;
  uint32_t flags;  /* DS_SAMPLE_x */
  uint32_t tokens; /* of its own wording; what does not fit into a step is left out of it */
  float loss; /* worst mean negative log-probability of its wordings when last seen, nats/token */
  float kl;   /* mean KL(base || weights) when last seen, nats/token */
  float age_s;
  float reward; /* -1..1; 0 = unknown */
  uint32_t reserved;
} ds_sample;

enum {
  DS_TERM_CE = 1,        /* weight * mean cross-entropy of the answer */
  DS_TERM_KL_BASE = 2,   /* weight * mean KL(base || weights) on the answer */
  DS_TERM_KL_PARENT = 3, /* the same against the weights that the round began with */
  DS_TERM_LOGIT_MSE = 4, /* weight * mean squared difference to the stored logits */
  DS_TERM_SEQUENCE = 5   /* coefficients() turns summed log-probabilities into the gradient */
};
typedef struct ds_draw {
  uint32_t size;
  uint32_t term;
  uint64_t key;
  float weight;
  uint32_t
      wordings;  /* 0 or 1: one wording, the host draws which; n: the item's own and n - 1 others */
  uint32_t slot; /* gradient slot 0..3: terms of one slot add up in one backward pass */
  uint32_t rejected; /* SEQUENCE: 1 = the pair's rejected answer */
} ds_draw;

typedef struct ds_round {
  uint32_t size;
  uint32_t flags;
  uint64_t round, seed; /* the round's number in its lineage */
  uint32_t n_fresh, n_replay;
  uint64_t max_steps;
  float replay_ratio; /* share of earlier items in a step that the operator asks for, 0..1 */
  uint32_t reserved;
} ds_round;

typedef struct ds_sequence_stat { /* of a SEQUENCE draw, in the order they were emitted */
  uint64_t key;
  double logprob;        /* summed, under the current weights */
  double logprob_parent; /* under the weights that the round began with */
  uint32_t tokens;
  uint32_t rejected;
} ds_sequence_stat;

/* Vectors of the model's trainable parameters, by handle; all on the model's device. Slots 0..3
 * hold the gradients; handles from make() are the learner's, zero at first, and live until the
 * round ends, or with the instance if named: those are saved with the version. */
enum { DS_VEC_GRADIENT0 = 0, DS_VEC_WEIGHTS = 16, DS_VEC_PARENT = 17 };
typedef struct ds_vectors {
  uint32_t size;
  uint32_t flags;
  void* ctx;
  ds_code (*make)(void* ctx, ds_str name, int32_t* handle); /* empty name = of this round */
  ds_code (*copy)(void* ctx, int32_t from, int32_t to);
  ds_code (*scale)(void* ctx, float a, int32_t x);           /* x *= a */
  ds_code (*axpy)(void* ctx, float a, int32_t x, int32_t y); /* y += a * x */
  ds_code (*multiply)(void* ctx, float a, int32_t x, int32_t z,
                      int32_t y); /* y += a * x * z, by element */
  ds_code (*dot)(void* ctx, int32_t x, int32_t y, double* out);
} ds_vectors;

typedef struct ds_step_report {
  uint32_t size;
  uint32_t flags;
  uint64_t step;            /* from 0 */
  double loss;              /* summed terms */
  double gradient_norm;     /* of slot 0 as the optimizer took it, before clipping */
  const ds_sample* samples; /* [n_samples] all pools, with what this step saw of them */
  uint64_t n_samples;
} ds_step_report;

/* The host drives; per step: draws -> forward -> (coefficients) -> backward -> (combine) ->
 * optimizer on slot 0 -> (stepped). Randomness only from call->seed (round, step). All [serial]. */
typedef struct ds_learner {
  uint32_t size;
  uint32_t flags;
  ds_code (*round_begin)(ds_instance*, const ds_round*, ds_status*); /* opt. */
  /* Emits what the step trains on. No draw = the round is over. */
  ds_code (*draws)(ds_instance*, const ds_call*, const ds_sample* samples, uint64_t n_samples,
                   void* ctx, ds_code (*emit)(void* ctx, const ds_draw*), ds_status*);
  /* opt. out[i] = d loss / d logprob of sequence i. */
  ds_code (*coefficients)(ds_instance*, const ds_call*, const ds_sequence_stat*, uint64_t n,
                          double* out, ds_status*);
  ds_code (*combine)(ds_instance*, const ds_call*, const ds_vectors*,
                     ds_status*); /* opt.: into slot 0 */
  ds_code (*stepped)(ds_instance*, const ds_call*, const ds_vectors*, const ds_step_report*,
                     ds_status*);                                                    /* opt. */
  ds_code (*round_end)(ds_instance*, const ds_call*, const ds_vectors*, ds_status*); /* opt. */
  ds_code (*forget)(ds_instance*, const uint64_t* keys, uint64_t n,
                    ds_status*); /* opt.: erased items */
} ds_learner;

/* ---- Curriculum: which waiting items a round takes ------------------------------------------- */

typedef struct ds_curriculum {
  uint32_t size;
  uint32_t flags;
  /* [serial] Up to `budget` keys of `samples` into keys, in the order of training. */
  ds_code (*pick)(ds_instance*, const ds_call*, const ds_sample* samples, uint64_t n,
                  uint64_t budget, uint64_t* keys, uint64_t* n_keys, ds_status*);
  ds_code (*score)(ds_instance*, const ds_call*, const ds_sample* samples, uint64_t n,
                   float* difficulty, ds_status*); /* [any] opt. 0 easy .. 1 hard */
  ds_code (*outcome)(ds_instance*, const ds_sample* samples, uint64_t n, ds_status*); /* [serial]
                                                                       opt. after the round */
} ds_curriculum;

/* ---- Retriever: a knowledge base ------------------------------------------------------------- */

typedef struct ds_hit {
  uint64_t id;
  float score;
  uint32_t flags;
} ds_hit; /* higher = better */
typedef struct ds_retriever {
  uint32_t size;
  uint32_t flags;
  /* [serial] Adds or replaces; seen by search after commit. embedding f32 [width] or NULL. */
  ds_code (*put)(ds_instance*, uint64_t id, ds_str text, const ds_tensor* embedding,
                 ds_str meta_json, ds_status*);
  ds_code (*erase)(ds_instance*, const uint64_t* ids, uint64_t n,
                   ds_status*);                                   /* [serial] after commit, too */
  ds_code (*commit)(ds_instance*, uint64_t* version, ds_status*); /* [serial] all at once */
  /* [any] At most `max` hits, best first, equal scores by lower id. */
  ds_code (*search)(ds_instance*, const ds_call*, ds_str text, const ds_tensor* embedding,
                    ds_str filter_json, ds_hit* out, uint64_t max, uint64_t* n, ds_status*);
  /* [any] DS_E_ARG if there is no such id. */
  ds_code (*fetch)(ds_instance*, uint64_t id, const ds_sink* text, const ds_sink* meta_json,
                   ds_status*);
} ds_retriever;

/* ---- Tool: a static analyser, or anything that answers JSON ---------------------------------- */

enum { DS_SEVERITY_ERROR = 1, DS_SEVERITY_WARNING = 2, DS_SEVERITY_NOTE = 3 };
typedef struct ds_finding {
  uint32_t size;
  uint32_t severity;
  uint32_t line, column, end_line, end_column; /* from 1; 0 = unknown */
  ds_str rule, message, fix;                   /* fix: replacement of the range, or empty */
  float confidence;                            /* 0..1 */
  uint32_t flags;
} ds_finding;
typedef struct ds_tool {
  uint32_t size;
  uint32_t flags;
  ds_str input_schema; /* JSON Schema of what invoke takes */
  /* [any] opt. Findings in `text`, source code of `language` ("c++", "python"). `emit` returns a
   * code that the tool passes on; its argument is borrowed until emit returns. */
  ds_code (*analyse)(ds_instance*, const ds_call*, ds_str language, ds_str path, ds_str text,
                     void* ctx, ds_code (*emit)(void* ctx, const ds_finding*), ds_status*);
  ds_code (*invoke)(ds_instance*, const ds_call*, ds_str arguments_json, const ds_sink* result_json,
                    ds_status*); /* [any] opt. */
} ds_tool;

#endif /* DS_PLUGIN_KINDS_H */
