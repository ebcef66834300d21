// SPDX-License-Identifier: Apache-2.0
// Attention by a loaded plugin: one generation of it, and the arguments of its calls built once per
// step.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ds/status.h"
#include "engine/plugin_generation.h"
#include "engine/step_tables.h"
#include "kernels/buffer.h"
#include "kernels/ops.h"

namespace ds {

class Attention : public PluginGeneration {
 public:
  explicit Attention(std::shared_ptr<const PluginInstance> plugin, uint64_t generation);

  bool trains() const { return table_.backward != nullptr; }
  /// Whether serving calls on a GPU take `out_16`.
  bool gives_16_bits() const { return (table_.flags & DS_ATTENTION_OUT_16) != 0; }

  Result<ds_plan> plan(const ds_attn_args& args) const;
  /// decode() where every sequence has one row and the plugin has it.
  Status prefill(const ds_call& call, const ds_attn_args& args, bool one_row_each) const;
  Status backward(const ds_call& call, const ds_attn_args& args) const;

 private:
  using Function = ds_code (*)(ds_instance*, const ds_call*, const ds_attn_args*, ds_status*);
  Status run(Function function, const ds_call& call, const ds_attn_args& args) const;
  void record(const ds_attn_args& args, bool decode) const;

  ds_attention table_;
};

/// The serving calls of one step: begin(), then layer() for each layer. Keeps its memory.
class ServingAttention {
 public:
  /// `attention` and `tables` stay until the step ends.
  Status begin(const Attention& attention, const Ops& ops, const OpContext& context,
               int64_t n_heads, float scale, const StepTables& tables, const KvView& kv,
               int64_t n_pages);
  /// What the plugin wants beside each page of a layer; known after begin().
  int64_t page_extra_bytes() const { return page_extra_bytes_; }
  const void* workspace() const { return call_.workspace(); }
  bool gives_16_bits() const { return attention_->gives_16_bits(); }
  /// q, out [rows, n_heads * head_dim]; with data in `out_16`, which Attention::gives_16_bits(),
  /// the result goes there instead. `kv` of this layer, `extra` beside its pages, `extra_stride`
  /// bytes from page to page.
  Status layer(uint32_t layer, const float* q, float* out, const PreparedRows& out_16,
               const KvView& kv, std::byte* extra, int64_t extra_stride);

 private:
  const Attention* attention_ = nullptr;
  bool one_row_each_ = false;
  ds_device device_{};
  int64_t n_pages_ = 0, page_extra_bytes_ = 0;
  TensorView q_, out_, out_16_, rows_view_, lengths_view_, table_view_, k_, v_, extra_;
  ds_kv_view kv_{};
  ds_attn_args args_{};
  PassCall call_;
};

/// The training calls of one batch, forward and backward.
class TrainingAttention {
 public:
  struct Sequence {
    int64_t n_rows = 0, prefix = 0;  ///< in the order of the rows, which they cover
  };
  struct Pointers {  ///< of one layer
    const float *q = nullptr, *k = nullptr, *v = nullptr;
    float* out = nullptr;
    void* saved = nullptr;
    const float* dout = nullptr;
    float *dq = nullptr, *dk = nullptr, *dv = nullptr;
  };

  /// `operands`: what products may round theirs to. Bytes of `saved` per layer are in saved_bytes()
  /// after it.
  Status begin(std::shared_ptr<const Attention> attention, const Ops& ops, const OpContext& context,
               int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, float scale,
               std::span<const Sequence> sequences, int64_t rows, WeightFormat operands);
  size_t saved_bytes() const { return saved_bytes_; }
  const Attention& attention() const { return *attention_; }
  /// prefix_k / prefix_v: of each sequence at this layer, null where it has none.
  Status forward(uint32_t layer, const Pointers& at, std::span<const float* const> prefix_k,
                 std::span<const float* const> prefix_v);
  Status backward(uint32_t layer, const Pointers& at, std::span<const float* const> prefix_k,
                  std::span<const float* const> prefix_v);

 private:
  void point(uint32_t layer, const Pointers& at, std::span<const float* const> prefix_k,
             std::span<const float* const> prefix_v);

  std::shared_ptr<const Attention> attention_;
  size_t saved_bytes_ = 0;
  std::vector<int32_t> rows_;
  TensorView q_, out_, rows_view_, k_, v_, dout_, dq_, dk_, dv_;
  std::vector<std::unique_ptr<TensorView>> prefix_k_, prefix_v_;
  std::vector<const ds_tensor*> prefix_k_at_, prefix_v_at_;
  ds_train_view train_{};
  ds_attn_args args_{};
  PassCall call_;
};

}  // namespace ds
