// SPDX-License-Identifier: Apache-2.0
// From the arguments of the plugin ABI to those of the kernels, checked.
#pragma once

#include <algorithm>
#include <vector>

#include "ds/plugin.hpp"
#include "kernels/ops.h"

namespace ds::modules {

/// The sizes in a call.
struct AttentionShape {
  std::int64_t rows = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, batch = 0;
};

inline std::int32_t device_type(const ds_attn_args& a) {
  return a.q != nullptr ? a.q->device.type : DS_DEV_CPU;
}
inline bool on_gpu(const ds_attn_args& a) { return device_type(a) == DS_DEV_CUDA; }

inline std::span<const std::int32_t> integers(const ds_tensor* t, std::string_view name,
                                              std::int64_t n, std::int32_t device = DS_DEV_CPU) {
  return sdk::flat<const std::int32_t>(t, name, {n}, device);
}

/// Also checks that exactly one of kv and train is there and, where the host can read them, that
/// the rows are ascending.
inline AttentionShape shape_of(const ds_attn_args& a) {
  AttentionShape s;
  s.rows = sdk::dim(a.q, "q", 3, 0);
  s.n_heads = sdk::dim(a.q, "q", 3, 1);
  s.head_dim = sdk::dim(a.q, "q", 3, 2);
  s.batch = a.batch;
  if ((a.kv == nullptr) == (a.train == nullptr))
    throw sdk::error(DS_E_ARG, "exactly one of kv and train is expected");
  s.n_kv_heads = a.kv != nullptr ? sdk::dim(sdk::widened(a.kv).k_pages, "k_pages", 4, 1)
                                 : sdk::dim(sdk::widened(a.train).k, "k", 3, 1);
  if (s.n_kv_heads <= 0 || s.n_heads <= 0 || s.n_heads % s.n_kv_heads != 0 || s.head_dim <= 0)
    throw sdk::error(DS_E_SHAPE, std::to_string(s.n_heads) + " query heads over " +
                                     std::to_string(s.n_kv_heads) + " key heads of " +
                                     std::to_string(s.head_dim));
  const bool readable = a.train != nullptr || !on_gpu(a);
  const auto rows = integers(a.rows, "rows", s.batch + 1, readable ? DS_DEV_CPU : device_type(a));
  if (!readable) return s;
  bool ascending = rows.front() == 0 && rows.back() == s.rows;
  for (std::size_t b = 0; b + 1 < rows.size(); ++b) ascending = ascending && rows[b] <= rows[b + 1];
  if (!ascending)
    throw sdk::error(DS_E_SHAPE, "rows: not ascending from 0 to " + std::to_string(s.rows));
  return s;
}

/// The call's workspace as `n` objects of T.
template <class T>
std::span<T> in_workspace(const ds_call& call, std::int64_t n) {
  const auto count = static_cast<std::size_t>(n);
  if (call.workspace_bytes < count * sizeof(T))
    throw sdk::error(DS_E_ARG, "workspace: " + std::to_string(call.workspace_bytes) +
                                   " bytes, planned " + std::to_string(count * sizeof(T)));
  return {static_cast<T*>(call.workspace), count};
}

inline KvView kernel_kv(const ds_kv_view& kv, const AttentionShape& s, std::int32_t device) {
  if (kv.k_scale != nullptr || kv.v_scale != nullptr)
    throw sdk::error(DS_E_UNSUPPORTED, "kv: a quantized cache");
  if (kv.page_tokens != kKvPageTokens)
    throw sdk::error(DS_E_SHAPE,
                     "kv: pages of " + std::to_string(kv.page_tokens) + " tokens, expected 32");
  KvView out;
  out.n_kv_heads = s.n_kv_heads;
  out.head_dim = s.head_dim;
  const std::initializer_list<std::int64_t> shape = {-1, s.n_kv_heads, kKvPageTokens, s.head_dim};
  const auto take = [&]<class T>(KvDtype dtype, T) {
    const auto pages = [&](const ds_tensor* t, std::string_view name) {
      return const_cast<T*>(sdk::flat<const T>(t, name, shape, device).data());
    };
    out.dtype = dtype;
    out.k = pages(kv.k_pages, "k_pages");
    out.v = pages(kv.v_pages, "v_pages");
  };
  const ds_dtype dtype = kv.k_pages->dtype;
  if (dtype.code == DS_BFLOAT) {
    take(KvDtype::kBF16, sdk::bf16());
  } else if (dtype.code == DS_FLOAT && dtype.bits == 16 && device == DS_DEV_CUDA) {
    take(KvDtype::kF16, sdk::f16());
  } else {
    take(KvDtype::kF32, float());
  }
  return out;
}

/// A length that its pages cannot hold, or beyond what was planned for, is refused: the kernels
/// trust both.
inline void check_lengths(const AttentionArgs& a) {
  const std::int64_t room = std::min(a.table_width * kKvPageTokens, a.max_keys);
  for (std::int64_t b = 0; b < a.batch; ++b) {
    const std::int64_t n = a.starts[b + 1] - a.starts[b];
    if (a.lengths[b] < n || a.lengths[b] > room)
      throw sdk::error(DS_E_SHAPE, "lengths[" + std::to_string(b) +
                                       "]: " + std::to_string(a.lengths[b]) + " keys, expected " +
                                       std::to_string(n) + " to " + std::to_string(room));
  }
}

inline AttentionArgs serving_args(const ds_attn_args& a, const AttentionShape& s) {
  const ds_kv_view kv = sdk::widened(a.kv);
  const std::int32_t device = device_type(a);
  AttentionArgs out;
  out.n_heads = s.n_heads;
  out.q = sdk::flat<const float>(a.q, "q", {}, device).data();
  out.out = sdk::flat<float>(a.out, "out", {s.rows, s.n_heads, s.head_dim}, device).data();
  out.scale = a.scale;
  out.batch = s.batch;
  out.max_rows = a.max_rows;
  out.max_keys = a.max_keys;
  out.starts = integers(a.rows, "rows", s.batch + 1, device).data();
  out.lengths = integers(kv.lengths, "lengths", s.batch, device).data();
  out.table_width = sdk::dim(kv.block_table, "block_table", 2, 1);
  out.table = sdk::flat<const std::int32_t>(kv.block_table, "block_table",
                                            {s.batch, out.table_width}, device)
                  .data();
  out.kv = kernel_kv(kv, s, device);
  if (a.out_16 != nullptr) {
    if (device != DS_DEV_CUDA || s.n_heads * s.head_dim % 8 != 0)
      throw sdk::error(DS_E_UNSUPPORTED, "out_16: on a GPU alone, of columns in eights");
    const auto rows = [&]<class T>(WeightFormat format, T) {
      const auto to = sdk::flat<T>(a.out_16, "out_16", {s.rows, s.n_heads, s.head_dim}, device);
      out.out_16 = {.data = to.data(), .format = format};
    };
    if (a.out_16->dtype.code == DS_BFLOAT) {
      rows(WeightFormat::kBF16, sdk::bf16());
    } else {
      rows(WeightFormat::kF16, sdk::f16());
    }
    out.rows = s.rows;
  }
  if (device != DS_DEV_CUDA) check_lengths(out);
  return out;
}

/// What the host keeps beside the pages: `bytes` of each page from `data`, `stride` bytes from page
/// to page.
struct BesidePages {
  void* data = nullptr;
  std::int64_t stride = 0;
};
inline BesidePages beside_pages(const ds_kv_view& kv, std::int64_t bytes, std::int32_t device) {
  const std::int64_t pages = sdk::dim(kv.k_pages, "k_pages", 4, 0);
  const std::int64_t each = sdk::dim(kv.page_extra, "page_extra", 2, 1);
  ds_tensor all = *kv.page_extra;  // seen as one row, with what is between its rows
  const std::int64_t stride = pages > 1 ? all.strides[0] : each;
  if (all.shape[0] != pages || each < bytes || stride < each || stride % 4 != 0)
    throw sdk::error(DS_E_SHAPE, "page_extra: " + sdk::shape_text(all.shape, 2) + ", " +
                                     std::to_string(stride) + " bytes apart, planned " +
                                     std::to_string(bytes) + " beside each of " +
                                     std::to_string(pages) + " pages");
  const std::int64_t length = (pages - 1) * stride + each;
  all.ndim = 1;
  all.shape = &length;
  ++all.strides;
  return {sdk::flat<std::uint8_t>(all, "page_extra", {}, device).data(), stride};
}

/// Position of the first of sequence b's `n` rows in this call.
inline std::int64_t first_position(const ds_attn_args& a, std::size_t b, std::int64_t n) {
  if (a.kv != nullptr) return integers(sdk::widened(a.kv).lengths, "lengths", a.batch)[b] - n;
  const ds_train_view train = sdk::widened(a.train);
  if (train.prefix_k == nullptr || train.prefix_k[b] == nullptr) return 0;
  return sdk::dim(train.prefix_k[b], "prefix_k", 3, 0);
}

/// Forward and backward of training; `lse` [rows, n_heads] is kept in a.saved. `sequences` [batch]
/// is filled and pointed at.
inline TrainAttentionArgs training_args(const ds_attn_args& a, const AttentionShape& s,
                                        std::span<TrainSequence> sequences) {
  const ds_train_view train = sdk::widened(a.train);
  const std::int32_t device = device_type(a);
  const auto rows = integers(a.rows, "rows", s.batch + 1);
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    sequences[b] = {rows[b], rows[b + 1] - rows[b], 0, nullptr, nullptr};
    if (train.prefix_k == nullptr || train.prefix_k[b] == nullptr) continue;
    const std::int64_t tokens = sdk::dim(train.prefix_k[b], "prefix_k", 3, 0);
    const std::initializer_list<std::int64_t> shape = {tokens, s.n_kv_heads, s.head_dim};
    sequences[b].prefix = tokens;
    sequences[b].prefix_k =
        sdk::flat<const float>(train.prefix_k[b], "prefix_k", shape, device).data();
    if (train.prefix_v == nullptr) throw sdk::error(DS_E_ARG, "prefix_v: missing");
    sequences[b].prefix_v =
        sdk::flat<const float>(train.prefix_v[b], "prefix_v", shape, device).data();
  }
  const std::initializer_list<std::int64_t> kv_shape = {s.rows, s.n_kv_heads, s.head_dim};
  TrainAttentionArgs out;
  out.n_heads = s.n_heads;
  out.n_kv_heads = s.n_kv_heads;
  out.head_dim = s.head_dim;
  out.scale = a.scale;
  out.q = sdk::flat<const float>(a.q, "q", {}, device).data();
  out.k = sdk::flat<const float>(train.k, "k", kv_shape, device).data();
  out.v = sdk::flat<const float>(train.v, "v", kv_shape, device).data();
  out.out = sdk::flat<float>(a.out, "out", {s.rows, s.n_heads, s.head_dim}, device).data();
  out.lse = static_cast<float*>(a.saved);  // null: not kept
  out.sequences = sequences.data();
  out.n_sequences = s.batch;
  if ((train.flags & DS_TRAIN_ROUND_BF16) != 0) out.operands = WeightFormat::kBF16;
  if ((train.flags & DS_TRAIN_ROUND_FP16) != 0) out.operands = WeightFormat::kF16;
  return out;
}

inline void add_gradients(const ds_attn_args& a, const AttentionShape& s, TrainAttentionArgs& out) {
  const std::int32_t device = device_type(a);
  const std::initializer_list<std::int64_t> q_shape = {s.rows, s.n_heads, s.head_dim},
                                            kv_shape = {s.rows, s.n_kv_heads, s.head_dim};
  out.dout = sdk::flat<const float>(a.dout, "dout", q_shape, device).data();
  out.dq = sdk::flat<float>(a.dq, "dq", q_shape, device).data();
  out.dk = sdk::flat<float>(a.dk, "dk", kv_shape, device).data();
  out.dv = sdk::flat<float>(a.dv, "dv", kv_shape, device).data();
}

/// f(arguments of training). What the kernels are told about sequences is the host's memory, which
/// the workspace is on the CPU alone: there it is the first TrainSequences of it.
template <class F>
void with_training_args(const ds_call& call, const ds_attn_args& a, const AttentionShape& s,
                        bool back, const F& f) {
  std::vector<TrainSequence> own(static_cast<std::size_t>(on_gpu(a) ? s.batch : 0));
  TrainAttentionArgs args =
      training_args(a, s, on_gpu(a) ? std::span(own) : in_workspace<TrainSequence>(call, s.batch));
  if (back) add_gradients(a, s, args);
  f(args);
}

}  // namespace ds::modules
