// SPDX-License-Identifier: Apache-2.0
// Ops: the one contract of compute. A backend fills this table; engine and trainer are written once
// against it. Pure: no files, no globals; the pool (CPU) or stream (GPU) comes with each call,
// memory is the caller's. Pointers are to the backend's memory (allocate() below; on the CPU any
// memory), but for the argument structs themselves and what is marked host. All activations are
// FP32, row-major.
//
// On a GPU a call only enqueues: results are there, and errors are told, after finish(). The same
// call order on one stream is the order of execution.
//
// One numerics: on a CPU's table a row's result does not depend on which or how many rows go with
// it, nor on the number of threads. Every output element has one fixed order of accumulation. On a
// GPU the order depends on the number of rows (cuBLAS); results agree within the ops' tolerances.
#pragma once

#include <cstdint>

#include "ds/parallel.h"

namespace ds {

struct OpContext {
  const ds_parallel* parallel = nullptr;  ///< CPU: the host's pool
  void* stream = nullptr;                 ///< GPU: the stream to enqueue on, never null
  int32_t device = 0;                     ///< GPU: its number
};

/// How a weight matrix W [n, k] (y = W x) is laid out. CPU: panels of 16 rows, zeros at the end,
///   kF32   [ceil(n/16)][k][16]                 float
///   kBF16  [ceil(n/16)][ceil(k/2)][16][2]      bfloat16, neighbouring k in a 32-bit lane
/// CUDA: [n][k] row-major, rows padded with zeros to a multiple of 16 bytes.
/// It is the element of both operands of a product, too, whose sums are FP32. kF16: what is beyond
/// 65504 becomes that (saturates). kTF32: as kF32 in memory, products of more than a few rows round
/// operands to TF32. The CPU has kF16 and kTF32 as kF32, in layout and products.
enum class WeightFormat : uint8_t { kF32 = 0, kBF16 = 1, kF16 = 2, kTF32 = 3 };
constexpr bool is_f32(WeightFormat f) {
  return f == WeightFormat::kF32 || f == WeightFormat::kTF32;
}
/// Of the backward pass, beside this one of the forward pass: gradients want the range of BF16.
constexpr WeightFormat backward_format(WeightFormat forward) {
  return forward == WeightFormat::kF16 ? WeightFormat::kBF16 : forward;
}

/// Where rows for linear layers go, as prepare() gives them.
struct PreparedRows {
  void* data = nullptr;  ///< null: nobody wants them
  WeightFormat format = WeightFormat::kBF16;
  int32_t* saturated = nullptr;  ///< += how many values saturated; null: nobody counts
  /// Elements between rows. 0: as prepare() has them. Else, where Ops::rows_side_by_side, these are
  /// some columns of rows that lie side by side, their number a multiple of 8, as are the others'.
  int64_t stride = 0;
};

struct WeightView {
  WeightFormat format = WeightFormat::kBF16;
  int64_t n = 0, k = 0;
  const void* data = nullptr;  ///< 64-byte aligned
  bool transposed = false;     ///< `data` is the pack of W^T [k, n]: where Ops::reads_transposed
};

/// Rank of every low-rank pair as computed: trained rank <= 16, zero-padded.
constexpr int64_t kLoraRank = 16;
constexpr int kMaxLoraSlots = 8;
constexpr int kMaxFusedWeights = 3;

/// y += scale * B (A x), A [16, k], B [n, 16], both packed in the format of the base weight.
struct LoraPair {
  WeightView a, b;  ///< data == nullptr: this weight has no low-rank part in this slot
  float scale = 0.0f;
};

/// A LoraPair in a table in the memory of the backend; a == nullptr: none. (ABI v1 layout.)
struct LoraEntry {
  const void *a = nullptr, *b = nullptr;
  float scale = 0.0f;
};

/// Low-rank parts of one call (a struct of the host). Rows choose their slot, so one batch may mix
/// versions. Slots of rows, table and factors are uploaded or packed, not results of other ops: a
/// call may read them before the ops that were enqueued ahead of it are done.
struct LoraSlots {
  const int32_t* slot_of_row = nullptr;  ///< [rows], -1 = base only
  int n_slots = 0;
  LoraPair pair[kMaxLoraSlots][kMaxFusedWeights];
  /// What is in `pair` again, [n_weights][kMaxLoraSlots] in the memory of the backend, or null.
  /// Where it is given and host_memory is false, it is read when the call runs: a recording of the
  /// call serves whatever pairs are there by then.
  const LoraEntry* table = nullptr;
  WeightFormat table_format = WeightFormat::kBF16;  ///< of the factors in it
  float* t = nullptr;  ///< out/workspace [n_weights][rows][16]: A x of each row (kept for backward)
};

enum class Epilogue : uint8_t {
  kNone,      ///< y_i = W_i x (+ bias_i)
  kResidual,  ///< y_0 = residual + W_0 x (+ bias_0); residual may alias y_0
  kSwiglu,    ///< y_0 = silu(W_0 x + b_0) * (W_1 x + b_1); n_weights == 2
};

/// One matrix to pack, as in pack().
struct PackItem {
  WeightFormat format = WeightFormat::kBF16;
  bool transposed = false;
  int64_t n = 0, k = 0;
  const float* source = nullptr;
  void* packed = nullptr;
};

/// The low-rank factors of one weight [n, k] in training, and their four packs: A and B for the
/// forward pass in `format`, B^T and A^T for the backward pass in backward_format(format).
struct FactorPack {
  WeightFormat format = WeightFormat::kBF16;
  int64_t n = 0, k = 0;
  const float* a = nullptr;                         ///< [rank, k]
  const float* bt = nullptr;                        ///< [rank, n]
  void *a_packed = nullptr, *b_packed = nullptr;    ///< [16, k], [n, 16]
  void *bt_packed = nullptr, *at_packed = nullptr;  ///< [16, n], [k, 16]
};

struct RopeAppendArgs;

/// One shared input, up to three weights: q/k/v, gate/up, or one alone. The backward pass with
/// respect to the input is this same op on transposed weights (and B^T, A^T as the low-rank pair).
struct LinearArgs {
  int64_t rows = 0;
  const float* x = nullptr;          ///< [rows, k]
  int64_t x_stride = 0;              ///< floats between rows of x
  const void* x_prepared = nullptr;  ///< from prepare(); null if prepared_bytes() is 0
  /// As in PreparedRows, for an x that is not prepared and has no norm; null: nobody counts.
  int32_t* saturated = nullptr;
  // Neighbouring phases in the same call, where Ops::fuses_phases.
  /// RMSNorm of x, which is not prepared, comes first, with this weight [k]; null: none.
  const float* norm = nullptr;
  float norm_eps = 0;
  /// The outputs are q, k and v of a serving step: rope_append() follows, whose q is y[0]; k and v
  /// go to the pages alone, y[1] and y[2] may be null. Null: not.
  const RopeAppendArgs* rope = nullptr;
  int n_weights = 0;
  WeightView w[kMaxFusedWeights];  ///< all with the same k and format
  const float* bias[kMaxFusedWeights] = {nullptr, nullptr, nullptr};  ///< [n] or null
  float* y[kMaxFusedWeights] = {nullptr, nullptr, nullptr};           ///< [rows, n]
  int64_t y_stride[kMaxFusedWeights] = {0, 0, 0};                     ///< floats between rows
  const LoraSlots* lora = nullptr;
  Epilogue epilogue = Epilogue::kNone;
  const float* residual = nullptr;  ///< [rows, n_0], stride y_stride[0]
  /// With kSwiglu: y_0 as prepare() gives it for such weights, or null. Where it is given and
  /// host_memory is false, y[0] may be null. Only of rows whose prepared_bytes() are not 0.
  void* y_prepared = nullptr;
  /// The products side by side, [rows, n_0 + n_1 + ..], in the weights' format of 16 bits, instead
  /// of y: where Ops::rows_side_by_side, each n is a multiple of 8, and nothing is added to
  /// products. What FP16 cannot hold is infinite there.
  void* y_16 = nullptr;
};

/// Paged K/V of one layer: pages of 32 tokens, [page][kv_head][32][head_dim]. (ABI v1 layout.)
constexpr int64_t kKvPageTokens = 32;
enum class KvDtype : uint8_t { kF32 = 0, kBF16 = 1, kF16 = 2 };  ///< kF16: on a GPU alone

struct KvView {
  KvDtype dtype = KvDtype::kBF16;
  int64_t n_kv_heads = 0, head_dim = 0;
  void* k = nullptr;  ///< base of the layer's key pages
  void* v = nullptr;
};

/// Rotates q and k in place (by halves, HF layout), then stores k and v of each row in its page.
struct RopeAppendArgs {
  int64_t rows = 0, n_heads = 0;
  float* q = nullptr;          ///< [rows, n_heads * head_dim]
  float* k = nullptr;          ///< [rows, n_kv_heads * head_dim]
  const float* v = nullptr;    ///< [rows, n_kv_heads * head_dim]
  const float* cos = nullptr;  ///< [positions, head_dim / 2]
  const float* sin = nullptr;
  const int32_t* positions = nullptr;  ///< [rows] in the row's sequence
  const int32_t* slots = nullptr;      ///< [rows] page * 32 + position % 32
  KvView kv;
};

/// Rotates in place, as RopeAppendArgs; `inverse`: back, which is the gradient.
struct RopeArgs {
  int64_t rows = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0;
  const int32_t* positions = nullptr;          ///< [rows]
  const float *cos = nullptr, *sin = nullptr;  ///< [positions, head_dim / 2]
  bool inverse = false;
  float* q = nullptr;        ///< [rows, n_heads * head_dim]
  float* k = nullptr;        ///< [rows, n_kv_heads * head_dim]
  const float* v = nullptr;  ///< like k; does not turn, only v_prepared is made of it. Or null
  /// The results in BF16, or without data. Where they are given and host_memory is false, they are
  /// there alone, and q and k are undefined.
  PreparedRows q_prepared = {}, k_prepared = {}, v_prepared = {};
};

/// y = silu(gate) * up, and its gradient.
struct SwigluArgs {
  int64_t rows = 0, d = 0;
  const float *gate = nullptr, *up = nullptr;  ///< [rows, d]
  /// Instead of them, where Ops::rows_side_by_side and d is a multiple of 8: FP16 [rows, 2 d], gate
  /// beside up, as in LinearArgs::y_16. What is infinite there is 65,504 and counts as saturated.
  const void* gate_up_f16 = nullptr;
  /// [rows, d]. Of the gradient each may be null, else it is the same again; y may not alias.
  float* y = nullptr;
  PreparedRows y_prepared = {};
  // The gradient.
  const float* dy = nullptr;               ///< [rows, d]
  const void* dy_bf16 = nullptr;           ///< instead of it, as gate_up_f16
  float *dgate = nullptr, *dup = nullptr;  ///< overwritten; they may alias gate, up and dy
  PreparedRows dgate_prepared = {}, dup_prepared = {};
};

/// A mixed batch: rows [starts[s], starts[s + 1]) are the last tokens of sequence s, whose keys so
/// far are lengths[s], its own rows' among them. Each row sees the keys up to its own position
/// (causal).
struct AttentionArgs {
  int64_t n_heads = 0;
  const float* q = nullptr;  ///< [rows, n_heads * head_dim], rotated
  float* out = nullptr;      ///< same shape
  float scale = 0.0f;
  int64_t batch = 0;                 ///< sequences
  int64_t max_rows = 0;              ///< at least the rows of any sequence
  int64_t max_keys = 0;              ///< at least the length of any sequence
  const int32_t* starts = nullptr;   ///< [batch + 1], ascending from 0
  const int32_t* lengths = nullptr;  ///< [batch]
  const int32_t* table = nullptr;    ///< [batch, table_width] page ids in the order of positions
  int64_t table_width = 0;
  KvView kv;
  /// Instead of out, which is room for whatever then, where Ops::rows_side_by_side and n_heads *
  /// head_dim is a multiple of 8: the `rows` of all sequences as linear layers read them.
  PreparedRows out_16 = {};
  int64_t rows = 0;
};

/// Training attention on whole sequences packed by rows, optionally behind a frozen prefix whose
/// K/V get no gradient. Everything FP32 in memory. The array of sequences is the host's and is read
/// before the call returns.
struct TrainSequence {
  int64_t row0 = 0, n_rows = 0;
  int64_t prefix = 0;               ///< tokens of the frozen prefix, all visible
  const float* prefix_k = nullptr;  ///< [prefix, n_kv_heads * head_dim], rotated
  const float* prefix_v = nullptr;
};
struct TrainAttentionArgs {
  int64_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
  float scale = 0.0f;
  const float *q = nullptr, *k = nullptr, *v = nullptr;  ///< rotated q, k
  float* out = nullptr;                                  ///< forward: written; backward: read
  float* lse = nullptr;                                  ///< [rows, n_heads] natural log-sum-exp
  const float* dout = nullptr;                           ///< backward
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;     ///< backward: overwritten
  const TrainSequence* sequences = nullptr;
  int64_t n_sequences = 0;
  /// Products may round their operands to this, the backward pass to its backward_format(); sums
  /// stay FP32.
  WeightFormat operands = WeightFormat::kF32;
};

/// Which keys each row reads: those of row r (of the call) and kv head h are at
/// keys[(r * n_kv_heads + h) * stride] and on, counts[r * n_kv_heads + h] of them (at least one),
/// as ascending positions in the row's sequence, its prefix included.
struct KeySelection {
  const int32_t* keys = nullptr;
  const int32_t* counts = nullptr;
  int64_t stride = 0;
};

/// A choice of keys: for each kv head a row at position t reads the last `window` keys and, of
/// those before them, the first `sinks` and the ones with the smallest |k|^2, `globals` in all; of
/// equal ones the earlier. It depends on the row's own sequence alone, so on one backend it is the
/// same however the sequence was cut into calls.
struct KeyChoice {
  int64_t window = 1, globals = 0, sinks = 0;  ///< window at least 1
  /// In place of that: [sequences, n_given] positions, of which each row reads the first `globals`
  /// that are before its window; what is no position is passed over. Null: the choice above.
  const int32_t* given = nullptr;
  int64_t n_given = 0;
  /// What is kept, kept_stride bytes (a multiple of 4) from page to page: kept_bytes(n_kv_heads) of
  /// each, a function of the sequence up to the page's end, as the page itself. In training only
  /// room, from sequence to sequence: 4 n_kv_heads bytes for each of its keys, its prefix included.
  void* kept = nullptr;
  int64_t kept_stride = 0;
  int32_t *keys = nullptr, *counts = nullptr;  ///< written, as a KeySelection has them
  int64_t stride = 0;                          ///< at least window + globals, or the longest list

  int64_t kept_bytes(int64_t n_kv_heads) const {
    return n_kv_heads * (kKvPageTokens + globals) * int64_t{4};
  }
  KeySelection selection() const { return {keys, counts, stride}; }
};

/// Softmax cross-entropy of logits [rows, vocab]: loss[r] = -weight[r] * log p(target[r]).
struct CrossEntropyArgs {
  int64_t rows = 0, vocab = 0, stride = 0;
  float* logits = nullptr;          ///< overwritten by d(sum of losses)/d logits when `gradient`
  const int32_t* target = nullptr;  ///< [rows]
  const float* weight = nullptr;    ///< [rows]
  float* logprob = nullptr;         ///< [rows] out: log p(target)
  int32_t* argmax = nullptr;        ///< [rows] out, or null
  bool gradient = false;
  /// The gradient as prepare() gives it, or null. Where host_memory is false it is there alone.
  void* prepared = nullptr;
};

/// weight[r] * KL(stored || softmax(logits[r])) where the stored side is its top-k probabilities
/// and one bucket for the rest: sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest).
struct KlTopkArgs {
  int64_t rows = 0, vocab = 0, stride = 0, top_k = 0;
  float* logits = nullptr;         ///< overwritten by the gradient when `gradient`
  const int32_t* index = nullptr;  ///< [rows, top_k]
  const float* logprob = nullptr;  ///< [rows, top_k] stored natural logs
  const float* weight = nullptr;   ///< [rows]
  float* kl = nullptr;             ///< [rows] out, unweighted
  bool gradient = false;
  void* prepared = nullptr;  ///< as in CrossEntropyArgs
};

/// out [n, k] += scale * dy^T x over rows; the gradient of a weight.
struct OuterArgs {
  int64_t rows = 0, n = 0, k = 0;
  const float* dy = nullptr;  ///< [rows, n]
  int64_t dy_stride = 0;      ///< floats between rows
  const float* x = nullptr;   ///< [rows, k]
  int64_t x_stride = 0;
  float scale = 1.0f;
  float* out = nullptr;
  /// As prepare() gives them for BF16 weights, or null. Where both are given, products may be of
  /// those, and where host_memory is false, what is given so need not be there in FP32; the CPU
  /// reads FP32 alone. dy of up to 16 columns is FP32 in any case.
  const void *dy_prepared = nullptr, *x_prepared = nullptr;
  int64_t dy_prepared_stride = 0;  ///< as PreparedRows::stride
  bool tf32 = false;               ///< products of FP32 may round their operands to TF32
};

/// Decoupled weight decay (Loshchilov and Hutter 2019), bias-corrected moments. The gradient is
/// scaled down to a norm of `clip` where it is larger; where the norm is not finite, nothing
/// changes.
struct AdamWArgs {
  int64_t n = 0;
  float *master = nullptr, *m = nullptr, *v = nullptr;  ///< FP32 parameter and moments
  const float* gradient = nullptr;
  const double* squares = nullptr;  ///< sum of squares of the whole gradient; null: no clipping
  float clip = 0;                   ///< 0: no clipping
  float lr = 0, beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, weight_decay = 0;
  int64_t step = 1;  ///< from 1, for bias correction
};

/// From each row of logits a token: the first of the largest where its heat is 0, else drawn with
/// weights e^(heat * (logit - largest)): the first at which the weights so far sum to more than
/// `chance` of all.
struct SampleArgs {
  int64_t rows = 0, vocab = 0, stride = 0;
  const float* logits = nullptr;
  const float* heat = nullptr;     ///< [rows] 1 / temperature, or 0
  const double* chance = nullptr;  ///< [rows] in [0, 1)
  int32_t* token = nullptr;        ///< [rows] out; -1 where a logit is not finite
};

/// The table. Every entry is filled by every backend; `tests/kernels/ops_test.cpp` runs each
/// against a double-precision oracle, finite differences, and as a benchmark.
struct Ops {
  /// "cpu-scalar", "cpu-avx2", "cpu-avx512", "cpu-avx512-bf16", "cpu-avx512-amx", "cuda-sm90"
  const char* name;

  // Memory. On the CPU it is the host's, so that upload and download are copies.
  bool host_memory;        ///< allocate() gives memory that the host can use as its own
  bool reads_transposed;   ///< linear() takes views with `transposed`: no second pack is needed
  bool rows_side_by_side;  ///< rows of 16 bits: PreparedRows::stride, y_16 and the like
  bool fuses_phases;       ///< linear() takes LinearArgs::norm and ::rope
  void* (*allocate)(int64_t bytes);  ///< aligned to 256 bytes; null: there is not enough
  /// Host memory that is copied from and to at the bus's full speed, else like allocate().
  void* (*allocate_pinned)(int64_t bytes);
  void (*release_pinned)(void*);
  void (*release)(void*);  ///< nothing enqueued may use it any more; null is fine
  /// `host` may be reused once this returns.
  void (*upload)(const OpContext&, void* to, const void* host, int64_t bytes);
  void (*download)(const OpContext&, void* host, const void* from,
                   int64_t bytes);  ///< there after finish()
  void (*copy)(const OpContext&, void* to, const void* from, int64_t bytes);
  void (*zero)(const OpContext&, void* to, int64_t bytes);
  /// Waits for everything that was enqueued. Null, or what failed (a text for people); after a
  /// failure the backend's memory is lost and every call fails.
  const char* (*finish)(const OpContext&);

  // Recordings of calls, to be enqueued again as one. Between begin and end calls on the stream are
  // recorded instead of enqueued; finish, upload, download and whatever waits or allocates may not
  // be among them. Pointers and sizes are as recorded; what the pointers lead to is read when it is
  // replayed.
  /// Gives way to other streams as any op does; then says which part of the device calls run on. A
  /// recording stays on the part where it was made. Comes before begin_recording() and replay(),
  /// which do not give way themselves.
  uint64_t (*recording_place)(const OpContext&);
  bool (*begin_recording)(
      const OpContext&);  ///< false: this backend records nothing, calls just run
  void* (*end_recording)(const OpContext&);  ///< null: something was called that may not be
  void (*replay)(const OpContext&, void* recording);
  void (*release_recording)(void* recording);  ///< null is fine

  // Weights. `source` is FP32 row-major [n, k], or [k, n] when `transposed`.
  int64_t (*packed_bytes)(WeightFormat, int64_t n, int64_t k);
  void (*pack)(const OpContext&, WeightFormat, int64_t n, int64_t k, const float* source,
               bool transposed, void* packed);
  void (*unpack)(const OpContext&, const WeightView&, float* out);  ///< FP32 [n, k]
  /// Many at once; the array is in the memory of the backend, as what it points to.
  void (*pack_all)(const OpContext&, int64_t count, const PackItem* items);
  /// Packs the factors of `count` weights; rows and columns of the packs beyond `rank` are zero.
  /// The array is in the memory of the backend, as what it points to.
  void (*pack_factors)(const OpContext&, int64_t rank, int64_t count, const FactorPack* factors);

  // Shared input of linear layers, converted once; 0 bytes: linear converts it itself, or need not.
  // Ops with an output `prepared` give their result in that form, too (a plain pointer: for BF16
  // weights), if it is not null; beside it the FP32 result may be null where host_memory is false.
  int64_t (*prepared_bytes)(WeightFormat, int64_t rows, int64_t k);
  void (*prepare)(const OpContext&, int64_t rows, int64_t k, const float* x, int64_t x_stride,
                  const PreparedRows& to);
  void (*linear)(const OpContext&, const LinearArgs&);

  /// The array is the host's; no two have the same `out`. Those of up to 16 columns of dy have
  /// little work each: a GPU takes them together.
  void (*outer_accumulate)(const OpContext&, int64_t count, const OuterArgs*);

  /// y = x * rsqrt(mean(x^2) + eps) * w; rstd [rows] is kept for backward (may be null).
  void (*rmsnorm)(const OpContext&, int64_t rows, int64_t d, const float* x, const float* w,
                  float eps, float* y, float* rstd, const PreparedRows& prepared);
  /// dx += gradient with respect to x, and dx_prepared (or null) = the sum as prepare() gives it
  /// for BF16 weights; dw (or null) += gradient with respect to w.
  void (*rmsnorm_backward)(const OpContext&, int64_t rows, int64_t d, const float* dy,
                           const float* x, const float* w, const float* rstd, float* dx,
                           void* dx_prepared, float* dw);

  void (*rope_append)(const OpContext&, const RopeAppendArgs&);
  /// Rotation alone, for training.
  void (*rope)(const OpContext&, const RopeArgs&);
  void (*attention)(const OpContext&, const AttentionArgs&);
  void (*attention_train)(const OpContext&, const TrainAttentionArgs&);
  void (*attention_train_backward)(const OpContext&, const TrainAttentionArgs&);
  /// Lists of keys for the rows of a call; q and out are not looked at.
  void (*choose_keys)(const OpContext&, const AttentionArgs&, const KeyChoice&);
  void (*choose_train_keys)(const OpContext&, const TrainAttentionArgs&, const KeyChoice&);
  // Attention over chosen keys. In training lse may be null: not kept.
  void (*attention_selected)(const OpContext&, const AttentionArgs&, const KeySelection&);
  void (*attention_selected_train)(const OpContext&, const TrainAttentionArgs&,
                                   const KeySelection&);
  void (*attention_selected_train_backward)(const OpContext&, const TrainAttentionArgs&,
                                            const KeySelection&);

  void (*swiglu)(const OpContext&, const SwigluArgs&);
  void (*swiglu_backward)(const OpContext&, const SwigluArgs&);
  void (*relu)(const OpContext&, int64_t n, float* x);
  void (*relu_backward)(const OpContext&, int64_t n, const float* y, float* dy);  ///< dy *= (y > 0)

  /// Rows of a packed matrix [vocab, d] by id, as FP32 [rows, d].
  void (*embed)(const OpContext&, const WeightView& table, int64_t rows, const int32_t* ids,
                float* out);
  /// out[r] = x[index[r]], rows of d.
  void (*gather_rows)(const OpContext&, int64_t rows, int64_t d, const int32_t* index,
                      const float* x, float* out);
  /// out[index[r]] = x[r]; the indices are distinct, other rows stay.
  void (*scatter_rows)(const OpContext&, int64_t rows, int64_t d, const int32_t* index,
                       const float* x, float* out);
  /// out [vocab, d] row-major: out[ids[r]] += dy[r].
  void (*embed_backward)(const OpContext&, int64_t rows, int64_t d, const int32_t* ids,
                         const float* dy, float* out);

  void (*sample)(const OpContext&, const SampleArgs&);
  void (*cross_entropy)(const OpContext&, const CrossEntropyArgs&);
  void (*kl_topk)(const OpContext&, const KlTopkArgs&);

  void (*adamw)(const OpContext&, const AdamWArgs&);
  // Vectors of parameters. Results are in the memory of the backend.
  /// *out = sum of x y, in double, in a fixed order of chunks.
  void (*dot)(const OpContext&, int64_t n, const float* x, const float* y, double* out);
  /// y = a x + b y; what a factor of 0 multiplies is not read. x may be y.
  void (*axpby)(const OpContext&, int64_t n, float a, const float* x, float b, float* y);
  /// y += a x z.
  void (*multiply_add)(const OpContext&, int64_t n, float a, const float* x, const float* z,
                       float* y);
};

enum class CpuIsa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAvx512Amx };

/// Best ISA of this machine: AMX tiles where the kernel grants them; AVX-512 BF16 dot products only
/// where they are faster than FP32 FMA (AMD Zen 4 and later; Intel's run at half rate: see
/// kernels/README.md).
CpuIsa best_cpu_isa();
bool cpu_supports(CpuIsa isa);
const Ops& cpu_ops(CpuIsa isa);

}  // namespace ds
