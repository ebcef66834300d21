// SPDX-License-Identifier: Apache-2.0
// Linear layers of many rows, and the choice between the ways of a call.
#include "kernels/cuda/linear.h"
#include "kernels/cuda/low_rank.cuh"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/rope.cuh"
#include "kernels/cuda/table.h"

namespace ds::cuda {
namespace {

constexpr int kThreads = 128;  // columns of a block
constexpr int kTileRows = 4;   // rows that one thread finishes

/// Where the results of one weight go.
struct Output {
  float* y = nullptr;
  int64_t stride = 0, end = 0;  ///< its last column and those before it, side by side
};

/// Products of rows in memory, to be finished: into the outputs, which may be where they are, or
/// into rounded rows.
struct Finish {
  int64_t rows = 0, n = 0;  ///< columns of all outputs
  const float* product =
      nullptr;                ///< from weight `weight` on, side by side; of the gate with swiglu
  const float* up = nullptr;  ///< of weight 1 with swiglu
  int64_t stride = 0;         ///< of both
  Output out[kMaxFusedWeights];
  void* prepared = nullptr;  ///< [rows, padded n] in the format of the weights; null: into out
  int weight = 0;
  Additions add;
};

/// y = product + low-rank part + bias, then swiglu; products have their residual. A thread takes
/// one column of kTileRows rows, whose products it asks for at once, and loads its row of B again
/// only where the slot changes.
template <typename T, bool kPaired>
__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ Finish a) {
  begin_after_previous();
  constexpr int kParts = kPaired ? 2 : 1;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t padded = padded_k(WeightFormat::kBF16, a.n);
  auto* const prepared = static_cast<T*>(a.prepared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileRows;
  if (i >= a.n) {
    if (prepared == nullptr || i >= padded) return;
    for (int64_t row = first; row < a.rows && row < first + kTileRows; ++row) {
      prepared[row * padded + i] = from_float<T>(0.0f);
    }
    return;
  }
  int output = 0;
  if constexpr (!kPaired) {
    while (i >= a.out[output].end) ++output;
  }
  const Output& out_of = a.out[output];
  const int64_t column = i - (output > 0 ? a.out[output - 1].end : 0);
  float product[kTileRows][kParts];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t row = first + r;
    if (row >= a.rows) break;
    product[r][0] = a.product[row * a.stride + i];
    if constexpr (kPaired) product[r][1] = a.up[row * a.stride + i];
  }
  LowRow<T> b[kParts];
  float bias[kParts];
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const float* from = a.add.bias[a.weight + output + p];
    bias[p] = from == nullptr ? 0.0f : from[column];
  }
  int32_t loaded = -1;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t row = first + r;
    if (row >= a.rows) return;
    const int32_t slot = a.add.slot_of_row == nullptr ? -1 : a.add.slot_of_row[row];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int w = a.weight + output + p;
      const LoraEntry low = slot < 0 ? LoraEntry{} : a.add.low.at(w, slot);
      if (low.b != nullptr) {
        if (slot != loaded) b[p].load(low.b, column);
        const float* t = a.add.t + (w * a.add.t_rows + row) * kLoraRank;
        product[r][p] = b[p].add_to(product[r][p], t, low.scale);
      }
      product[r][p] += bias[p];
    }
    loaded = slot;
    float out = product[r][0];
    if constexpr (kPaired) out = silu_times(out, product[r][1]);
    if (prepared != nullptr) {
      prepared[row * padded + i] = from_float<T>(out);
    } else {
      out_of.y[row * out_of.stride + column] = out;
    }
  }
}

constexpr int kLowRows = 16, kLowTiles = 4;  // of a warp of finish_low_rank(): tiles of 8 columns

/// finish_rows() on tensor cores: a warp adds B t to 16 rows of products of one output, of
/// kLowTiles * 8 of its columns. Grid: rows, columns.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish_low_rank(const __grid_constant__ Finish a) {
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLowRows + lane / 4;
  int64_t first = static_cast<int64_t>(blockIdx.y) * (kThreads / 32) + threadIdx.x / 32;
  int output = 0;
  int64_t begin = 0;  // of the output, among all columns
  for (;; begin = a.out[output++].end) {
    if (begin >= a.n) return;
    const int64_t warps = ceil_div(a.out[output].end - begin, kLowTiles * 8);
    if (first < warps) break;
    first -= warps;
  }
  first *= kLowTiles * 8;
  const Output& to = a.out[output];
  const int64_t n = to.end - begin;
  const int w = a.weight + output;
  const auto has = [&](int tile, int half) {
    return first + tile * 8 < n && row + 8 * half < a.rows;
  };
  WarpSlots slots;
  slots.look_up(a.add.slot_of_row, row, a.rows);
  begin_after_previous();  // slots do not wait for kernels (LoraSlots)
  float sum[kLowTiles][4] = {};
#pragma unroll
  for (int tile = 0; tile < kLowTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!has(tile, half)) continue;
      const float* from = a.product + (row + 8 * half) * a.stride + begin + first + tile * 8 + pair;
      const auto x = *reinterpret_cast<const float2*>(from);
      sum[tile][2 * half] = x.x, sum[tile][2 * half + 1] = x.y;
    }
  }
  for (int slot = slots.next(); slot >= 0; slot = slots.next()) {
    add_low_rank<T, kLowTiles>(a.add, slots, slot, w, row, static_cast<int>(first),
                               static_cast<int>(n),
                               [&](int tile) -> float(&)[4] { return sum[tile]; });
    slots.done(slot);
  }
  const float* bias = a.add.bias[w];
#pragma unroll
  for (int tile = 0; tile < kLowTiles; ++tile) {
    const int64_t column = first + tile * 8 + pair;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!has(tile, half)) continue;
      const float2 more =
          bias == nullptr ? make_float2(0, 0) : make_float2(bias[column], bias[column + 1]);
      *reinterpret_cast<float2*>(to.y + (row + 8 * half) * to.stride + column) =
          make_float2(sum[tile][2 * half] + more.x, sum[tile][2 * half + 1] + more.y);
    }
  }
}

/// Whether the call is for finish_low_rank(): it reads and writes pairs.
bool suits_low_rank(const Finish& a, WeightFormat format) {
  const auto even = [](const void* at, int64_t stride) {
    return is_aligned8(at) && stride % 2 == 0;
  };
  bool suits = a.add.slot_of_row != nullptr && !is_f32(format) && a.up == nullptr &&
               a.prepared == nullptr && even(a.product, a.stride);
  int64_t end = 0;
  for (int i = 0; end < a.n; ++i) {
    end = a.out[i].end;
    suits = suits && end % 8 == 0 && even(a.out[i].y, a.out[i].stride);
  }
  return suits;
}

void launch_finish(const StreamState& s, const Finish& a, WeightFormat format) {
  if (a.rows == 0 || a.n == 0) return;
  if (suits_low_rank(a, format)) {
    int64_t warps = 0, end = 0;
    for (int i = 0; end < a.n; end = a.out[i++].end)
      warps += ceil_div(a.out[i].end - end, kLowTiles * 8);
    const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kLowRows)),
                    static_cast<unsigned>(ceil_div(warps, kThreads / 32)));
    const auto kernel =
        format == WeightFormat::kF16 ? finish_low_rank<Half> : finish_low_rank<Bf16>;
    launch_next("end of a linear layer", kernel, grid, kThreads, 0, s.stream(), a);
    return;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kTileRows)),
                  static_cast<unsigned>(ceil_div(padded_k(WeightFormat::kBF16, a.n), kThreads)));
  with_element(format, [&]<typename T>(T) {
    const auto kernel = a.up != nullptr ? finish_rows<T, true> : finish_rows<T, false>;
    launch_next("end of a linear layer", kernel, grid, kThreads, 0, s.stream(), a);
  });
}

/// Products of q, k and v side by side, to be finished and put where rope_append() puts them.
struct FinishRope {
  const float* product = nullptr;  ///< [rows, stride]
  int64_t rows = 0, stride = 0;
  float* q = nullptr;
  int64_t q_stride = 0;
  RopeAppendArgs rope;
  Additions add;
};

/// A thread takes one pair of one head of kTileRows rows, whose products and places it asks for at
/// once. Grid: rows, pairs.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish_rope_rows(const __grid_constant__ FinishRope a) {
  begin_after_previous();
  const int half = static_cast<int>(a.rope.kv.head_dim) / 2;
  const int n = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  const int unit = n / half, pair = n % half, first = static_cast<int>(blockIdx.x) * kTileRows;
  if (unit >= a.rope.n_heads + 2 * a.rope.kv.n_kv_heads) return;
  const auto [w, head] = head_of(a.rope, unit);
  const int64_t i = head * 2 * half + pair;
  float x[kTileRows], y[kTileRows];
  PairPlace place[kTileRows];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int row = min(first + r, static_cast<int>(a.rows) - 1);
    const float* from = a.product + row * a.stride + unit * 2 * half + pair;
    x[r] = from[0];
    y[r] = from[half];
    place[r].find(a.rope, w, head, pair, row);
  }
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int row = first + r;
    if (row >= a.rows) return;
    place[r].put(a.rope, w, a.q + row * a.q_stride + i, with_additions<T>(a.add, w, i, row, x[r]),
                 with_additions<T>(a.add, w, i + half, row, y[r]));
  }
}

/// y [rows, n] = x W^T + add, which lies like y and may be y, or null; x is rounded rows for
/// weights of 16 bits, else FP32 rows. y is FP32, or `narrow`: rounded as the weights.
bool multiply(const StreamState& s, const WeightView& w, int64_t rows, const void* x,
              int64_t x_stride, const float* add, void* y, int64_t y_stride, bool narrow = false) {
  if (w.n == 0) return true;
  Product p = product_of(w.format);
  p.m = rows;
  p.n = w.n;
  // The padding of rows of 16 bits is zero on both sides: multiplied too, it keeps k a multiple of
  // 8. The pack of W^T has no such rows.
  p.k = is_f32(w.format) || w.transposed ? w.k : padded_k(w.format, w.k);
  p.a = {x, x_stride, false};
  p.b = {w.data, padded_k(w.format, w.transposed ? w.n : w.k), !w.transposed};
  p.beta = add == nullptr ? 0.0f : 1.0f;
  p.add = add;
  if (narrow) p.c_type = p.type;
  p.c = y;
  p.c_stride = y_stride;
  return s.multiply(p, "product of a linear layer");
}

/// Rows of a call of many rows: x as multiply() wants it.
struct Piece {
  int64_t row = 0, rows = 0;  ///< of the call
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* rounded = nullptr;  ///< x, if it is of 16 bits
};

/// Each weight's products in its y, finished there.
bool multiply_each(const StreamState& s, const LinearArgs& a, const Piece& p) {
  for (int w = 0; w < a.n_weights; ++w) {
    float* y = a.y[w] + p.row * a.y_stride[w];
    const float* residual =
        a.epilogue == Epilogue::kResidual ? a.residual + p.row * a.y_stride[w] : nullptr;
    if (!multiply(s, a.w[w], p.rows, p.x, p.x_stride, residual, y, a.y_stride[w])) return false;
    if (a.lora == nullptr && a.bias[w] == nullptr) continue;
    Finish f;
    f.rows = p.rows;
    f.n = a.w[w].n;
    f.product = y;
    f.stride = a.y_stride[w];
    f.out[0] = {y, f.stride, f.n};
    f.weight = w;
    f.add = additions_of(a, p.row);
    launch_finish(s, f, a.w[w].format);
  }
  return true;
}

/// Whether `next` continues w in memory, so that both are one matrix.
bool continues(const WeightView& w, const WeightView& next) {
  return !w.transposed && !next.transposed &&
         static_cast<const char*>(w.data) + packed_bytes(w.format, w.n, w.k) == next.data;
}

/// The call's weights from `w` on that lie side by side, as one; `next`: the first that does not.
WeightView side_by_side(const LinearArgs& a, int w, int* next) {
  WeightView view = a.w[w];
  while (++w < a.n_weights && continues(view, a.w[w])) view.n += a.w[w].n;
  *next = w;
  return view;
}

/// All weights' products side by side: [rows, total], in FP32 or `narrow`.
bool multiply_side_by_side(const StreamState& s, const LinearArgs& a, const Piece& p,
                           char* products, int64_t total, bool narrow) {
  for (int w = 0; w < a.n_weights;) {
    const WeightView view = side_by_side(a, w, &w);
    if (!multiply(s, view, p.rows, p.x, p.x_stride, nullptr, products, total, narrow)) return false;
    products += view.n * (narrow ? 2 : 4);
  }
  return true;
}

void finish_swiglu(const StreamState& s, const LinearArgs& a, const Piece& p, const char* products,
                   int64_t total) {
  const int64_t n = a.w[0].n;
  Finish f;
  f.rows = p.rows;
  f.n = n;
  f.product = reinterpret_cast<const float*>(products);
  f.up = f.product + n;
  f.stride = total;
  if (a.y_prepared != nullptr) {
    f.prepared = static_cast<char*>(a.y_prepared) + p.row * rounded_row_bytes(n);
  } else {
    f.out[0] = {a.y[0] + p.row * a.y_stride[0], a.y_stride[0], n};
  }
  f.add = additions_of(a, p.row);
  launch_finish(s, f, a.w[0].format);
}

/// Each weight's columns into its y, with what is added to them.
void finish_each(const StreamState& s, const LinearArgs& a, const Piece& p, const char* products,
                 int64_t total) {
  Finish f;
  f.rows = p.rows;
  f.n = f.stride = total;
  f.product = reinterpret_cast<const float*>(products);
  int64_t end = 0;
  for (int w = 0; w < a.n_weights; ++w)
    f.out[w] = {a.y[w] + p.row * a.y_stride[w], a.y_stride[w], end += a.w[w].n};
  f.add = additions_of(a, p.row);
  launch_finish(s, f, a.w[0].format);
}

void finish_rope(const StreamState& s, const LinearArgs& a, const Piece& p, const char* products,
                 int64_t total) {
  FinishRope f;
  f.product = reinterpret_cast<const float*>(products);
  f.rows = p.rows;
  f.stride = total;
  f.q = a.y[0] + p.row * a.y_stride[0];
  f.q_stride = a.y_stride[0];
  f.rope = from_row(*a.rope, p.row);
  f.add = additions_of(a, p.row);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, kTileRows)),
                  static_cast<unsigned>(ceil_div(total / 2, kThreads)));
  with_element(a.w[0].format, [&]<typename T>(T) {
    launch_next("end of q, k and v", finish_rope_rows<T>, grid, kThreads, 0, s.stream(), f);
  });
}

/// All of a piece in one launch, where swiglu or rotation follows its products; lora.t is there.
bool by_tiles(const StreamState& s, const LinearArgs& a, const Piece& p) {
  if (p.rounded == nullptr) return false;
  if (a.epilogue == Epilogue::kSwiglu && a.y_prepared != nullptr) {
    char* y = static_cast<char*>(a.y_prepared) + p.row * rounded_row_bytes(a.w[0].n);
    return swiglu_by_tiles(s, a.w[0], a.w[1], p.rows, p.rounded, p.x_stride, additions_of(a, p.row),
                           y);
  }
  if (a.rope == nullptr) return false;
  int next = 0;
  const WeightView heads = side_by_side(a, 0, &next);
  return next == a.n_weights &&
         rope_by_tiles(s, heads, p.rows, p.rounded, p.x_stride, additions_of(a, p.row),
                       a.y[0] + p.row * a.y_stride[0], a.y_stride[0], from_row(*a.rope, p.row));
}

/// t = A x of FP32 rows where all that have a low-rank part have the same one, known by now: what
/// rows without one get is not read.
bool multiply_low_rank(const StreamState& s, const LinearArgs& a, const Piece& p) {
  for (int w = 0; w < a.n_weights; ++w) {
    const WeightView& low = a.lora->pair[0][w].a;
    float* t = a.lora->t + (w * a.rows + p.row) * kLoraRank;
    if (low.data != nullptr && !multiply(s, low, p.rows, p.x, p.x_stride, nullptr, t, kLoraRank)) {
      return false;
    }
  }
  return true;
}

/// Rows [row, row + rows) of the call, normed and rounded into `room` where they have to be.
Piece piece_of(const StreamState& s, const LinearArgs& a, int64_t row, int64_t rows, char* room) {
  const WeightFormat format = a.w[0].format;
  const bool rounds = !is_f32(format);
  const int64_t k = a.w[0].k;
  const float* x = a.x + row * a.x_stride;
  if (rounds && a.x_prepared != nullptr) {
    const auto* there = static_cast<const char*>(a.x_prepared) + row * rounded_row_bytes(k);
    return {row, rows, there, padded_k(format, k), there};
  }
  if (!rounds && a.norm == nullptr) return {row, rows, x, a.x_stride, nullptr};
  if (!rounds) {
    norm_rows(s, rows, k, x, a.x_stride, a.norm, a.norm_eps, reinterpret_cast<float*>(room), {});
    return {row, rows, room, k, nullptr};
  }
  if (a.norm != nullptr) {
    norm_rows(s, rows, k, x, a.x_stride, a.norm, a.norm_eps, nullptr, {room, format});
  } else {
    round_rows(s, rows, k, x, a.x_stride, {room, format, a.saturated});
  }
  return {row, rows, room, padded_k(format, k), room};
}

/// In pieces whose rows and products, where these wait to be finished, fit the scratch.
void many_rows(const StreamState& s, const LinearArgs& a) {
  const bool swiglu = a.epilogue == Epilogue::kSwiglu;
  const bool apart = a.n_weights == 1 || a.lora == nullptr || a.epilogue == Epilogue::kResidual;
  const bool wait = swiglu || a.rope != nullptr || !apart;
  const int64_t k = a.w[0].k;
  int64_t total = 0;
  for (int w = 0; w < a.n_weights; ++w) total += a.w[w].n;
  const int64_t x_bytes = larger(rounded_row_bytes(k), a.norm == nullptr ? 0 : k * 4);
  const int64_t row_bytes = x_bytes + (wait ? total * 4 : 0);
  const int64_t each = smaller(a.rows, larger(1, (kScratchBytes - 256) / row_bytes));
  char* products = s.scratch<char>() + ceil_div(each * x_bytes, 256) * 256;
  for (int64_t row = 0; row < a.rows; row += each) {
    const Piece p = piece_of(s, a, row, smaller(each, a.rows - row), s.scratch<char>());
    if (a.lora != nullptr && (p.rounded != nullptr || !has_one_pair(*a.lora))) {
      low_rank_inputs(s, a, row, p.rows, p.rounded);
    } else if (a.lora != nullptr && !multiply_low_rank(s, a, p)) {
      return;
    }
    if (a.y_16 != nullptr) {
      char* y = static_cast<char*>(a.y_16) + row * total * 2;
      if (!multiply_side_by_side(s, a, p, y, total, true)) return;
      continue;
    }
    if (by_tiles(s, a, p)) continue;
    if (!(wait ? multiply_side_by_side(s, a, p, products, total, false) : multiply_each(s, a, p)))
      return;
    if (swiglu) {
      finish_swiglu(s, a, p, products, total);
    } else if (a.rope != nullptr) {
      finish_rope(s, a, p, products, total);
    } else if (wait) {
      finish_each(s, a, p, products, total);
    }
  }
}

}  // namespace

namespace {

/// Rows of a call of few_rows(): as many as its shared memory takes, 0 if not even one.
int64_t rows_at_once(WeightFormat format, int64_t k) {
  int64_t rows = kGemvRows;
  while (rows > 0 && rows * padded_k(format, k) * 4 > kMaxSharedBytes - kSharedForSums) rows /= 2;
  return rows;
}

}  // namespace

void linear(const OpContext& context, const LinearArgs& a) {
  const StreamState* s = enter(context);
  if (s == nullptr || a.rows == 0 || a.n_weights == 0) return;
  if (a.y_16 != nullptr) return many_rows(*s, a);
  if (some_rows(*s, a)) return;
  const int64_t each = rows_at_once(a.w[0].format, a.w[0].k);
  const int64_t most = a.w[0].n > kManyOutputs ? kGemvRows / 2 : kGemvRows;
  const bool many = a.rows > most || a.w[0].transposed || each == 0;
  if (many && a.w[0].k > 0) return many_rows(*s, a);
  if (a.lora != nullptr) low_rank_inputs(*s, a, 0, a.rows, nullptr);
  for (int64_t row = 0; row < a.rows; row += each) {
    few_rows(*s, a, row, smaller(each, a.rows - row));
  }
}

}  // namespace ds::cuda
