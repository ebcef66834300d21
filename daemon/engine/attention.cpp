// SPDX-License-Identifier: Apache-2.0
#include "engine/attention.h"

#include <algorithm>

namespace ds {
namespace {

/// What serving and training arguments share; the rest is zero.
ds_attn_args attn_args(size_t batch, int64_t max_rows, int64_t max_keys, float scale) {
  ds_attn_args args{};
  args.size = sizeof args;
  args.batch = static_cast<uint32_t>(batch);
  args.max_rows = static_cast<uint32_t>(max_rows);
  args.max_keys = static_cast<uint32_t>(max_keys);
  args.scale = scale;
  return args;
}

}  // namespace

Attention::Attention(std::shared_ptr<const PluginInstance> plugin, uint64_t generation)
    : PluginGeneration(std::move(plugin), generation), table_(plugin_->table<ds_attention>()) {}

Result<ds_plan> Attention::plan(const ds_attn_args& args) const {
  ds_plan plan{};
  plan.size = sizeof plan;
  ds_status st{};
  const PluginRunning running(plugin_->who());
  DS_TRY(judge(table_.plan(plugin_->handle(), &args, &plan, &st), st));
  plan = full_struct(&plan);
  DS_TRY(check_room(plan));
  return plan;
}

Status Attention::run(Function function, const ds_call& call, const ds_attn_args& args) const {
  const auto held = plugin_->one_call();
  ds_status st;
  st.len = 0;
  return judge(function(plugin_->handle(), &call, &args, &st), st);
}

Status Attention::prefill(const ds_call& call, const ds_attn_args& args, bool one_row_each) const {
  const bool decode = one_row_each && table_.decode != nullptr;
  DS_TRY(run(decode ? table_.decode : table_.prefill, call, args));
  if (args.kv != nullptr && args.q->device.type == DS_DEV_CPU &&
      plugin_->recorded().due(one_row_each ? CallSort::kDecode : CallSort::kPrefill))
    record(args, one_row_each);
  return {};
}

Status Attention::backward(const ds_call& call, const ds_attn_args& args) const {
  return run(table_.backward, call, args);
}

Status ServingAttention::begin(const Attention& attention, const Ops& ops, const OpContext& context,
                               int64_t n_heads, float scale, const StepTables& tables,
                               const KvView& kv, int64_t n_pages) {
  attention_ = &attention;
  device_ = device_of(context);
  one_row_each_ = tables.max_rows() == 1;
  const int64_t d = kv.head_dim, batch = tables.batch();
  for (TensorView* t : {&q_, &out_}) t->set(nullptr, kAbiF32, {tables.rows(), n_heads, d}, device_);
  rows_view_.set(tables.starts(), kAbiI32, {batch + 1}, device_);
  lengths_view_.set(tables.lengths(), kAbiI32, {batch}, device_);
  table_view_.set(tables.table(), kAbiI32, {batch, tables.table_width()}, device_);
  const ds_dtype element = kv_element(kv.dtype);
  for (TensorView* pages : {&k_, &v_})
    pages->set(nullptr, element, {n_pages, kv.n_kv_heads, kKvPageTokens, d}, device_);
  kv_ = {};
  kv_.size = sizeof kv_;
  kv_.page_tokens = kKvPageTokens;
  kv_.k_pages = k_.get();
  kv_.v_pages = v_.get();
  kv_.block_table = table_view_.get();
  kv_.lengths = lengths_view_.get();
  args_ = attn_args(static_cast<size_t>(batch), tables.max_rows(), tables.max_keys(), scale);
  args_.q = q_.get();
  args_.out = out_.get();
  args_.rows = rows_view_.get();
  args_.kv = &kv_;
  DS_ASSIGN(const ds_plan plan, attention.plan(args_));
  constexpr uint64_t kExtraLimit = 1 << 20;
  if (plan.page_extra_bytes > kExtraLimit)
    return Status(Code::kPlugin, std::string(attention.name()) + ": plans " +
                                     std::to_string(plan.page_extra_bytes) +
                                     " bytes beside a page, at most 1 MiB");
  n_pages_ = n_pages;
  page_extra_bytes_ = static_cast<int64_t>(plan.page_extra_bytes + 7) / 8 * 8;
  kv_.page_extra = page_extra_bytes_ > 0 ? extra_.get() : nullptr;
  return call_.begin(ops, context, plan.workspace_bytes);
}

Status ServingAttention::layer(uint32_t layer, const float* q, float* out,
                               const PreparedRows& out_16, const KvView& kv, std::byte* extra,
                               int64_t extra_stride) {
  if (page_extra_bytes_ > 0) {
    extra_.set(extra, kAbiU8, {n_pages_, page_extra_bytes_}, device_);
    extra_.set_row_stride(extra_stride,
                          static_cast<uint64_t>((n_pages_ - 1) * extra_stride + page_extra_bytes_));
  }
  args_.out_16 = nullptr;
  if (out_16.data != nullptr) {
    const auto& shape = out_.get()->shape;
    out_16_.set(out_16.data, element_of(out_16.format), {shape[0], shape[1], shape[2]}, device_);
    args_.out_16 = out_16_.get();
  }
  args_.layer = layer;
  q_.move_to(q);
  out_.move_to(out);
  k_.move_to(kv.k);
  v_.move_to(kv.v);
  return attention_->prefill(call_.get(), args_, one_row_each_);
}

Status TrainingAttention::begin(std::shared_ptr<const Attention> attention, const Ops& ops,
                                const OpContext& context, int64_t n_heads, int64_t n_kv_heads,
                                int64_t head_dim, float scale, std::span<const Sequence> sequences,
                                int64_t rows, WeightFormat operands) {
  attention_ = std::move(attention);
  const ds_device device = device_of(context);
  const size_t batch = sequences.size();
  rows_.assign(1, 0);
  int64_t max_rows = 0, max_keys = 0;
  prefix_k_.clear(), prefix_v_.clear();
  prefix_k_at_.assign(batch, nullptr), prefix_v_at_.assign(batch, nullptr);
  for (const Sequence& s : sequences) {
    rows_.push_back(rows_.back() + static_cast<int32_t>(s.n_rows));
    max_rows = std::max(max_rows, s.n_rows);
    max_keys = std::max(max_keys, s.prefix + s.n_rows);
    for (auto* views : {&prefix_k_, &prefix_v_}) {
      auto& view = views->emplace_back();
      if (s.prefix == 0) continue;
      view = std::make_unique<TensorView>();
      view->set(nullptr, kAbiF32, {s.prefix, n_kv_heads, head_dim}, device);
    }
  }
  for (TensorView* t : {&q_, &out_, &dout_, &dq_})
    t->set(nullptr, kAbiF32, {rows, n_heads, head_dim}, device);
  for (TensorView* t : {&k_, &v_, &dk_, &dv_})
    t->set(nullptr, kAbiF32, {rows, n_kv_heads, head_dim}, device);
  rows_view_.set(rows_.data(), kAbiI32, {std::ssize(rows_)});
  train_ = {};
  train_.size = sizeof train_;
  if (operands == WeightFormat::kBF16) train_.flags = DS_TRAIN_ROUND_BF16;
  if (operands == WeightFormat::kF16) train_.flags = DS_TRAIN_ROUND_FP16;
  train_.k = k_.get();
  train_.v = v_.get();
  for (size_t b = 0; b < batch; ++b) {
    if (prefix_k_[b] == nullptr) continue;
    prefix_k_at_[b] = prefix_k_[b]->get();
    prefix_v_at_[b] = prefix_v_[b]->get();
  }
  train_.prefix_k = prefix_k_at_.data();
  train_.prefix_v = prefix_v_at_.data();
  args_ = attn_args(sequences.size(), max_rows, max_keys, scale);
  args_.q = q_.get();
  args_.out = out_.get();
  args_.rows = rows_view_.get();
  args_.train = &train_;
  DS_ASSIGN(const ds_plan plan, attention_->plan(args_));
  saved_bytes_ = static_cast<size_t>(plan.saved_bytes);
  return call_.begin(ops, context, plan.workspace_bytes);
}

void TrainingAttention::point(uint32_t layer, const Pointers& at,
                              std::span<const float* const> prefix_k,
                              std::span<const float* const> prefix_v) {
  args_.layer = layer;
  q_.move_to(at.q);
  k_.move_to(at.k);
  v_.move_to(at.v);
  out_.move_to(at.out);
  args_.saved = at.saved;
  for (size_t b = 0; b < prefix_k_.size(); ++b) {
    if (prefix_k_[b] == nullptr) continue;
    prefix_k_[b]->move_to(prefix_k[b]);
    prefix_v_[b]->move_to(prefix_v[b]);
  }
}

Status TrainingAttention::forward(uint32_t layer, const Pointers& at,
                                  std::span<const float* const> prefix_k,
                                  std::span<const float* const> prefix_v) {
  point(layer, at, prefix_k, prefix_v);
  args_.dout = args_.dq = args_.dk = args_.dv = nullptr;
  return attention_->prefill(call_.get(), args_, false);
}

Status TrainingAttention::backward(uint32_t layer, const Pointers& at,
                                   std::span<const float* const> prefix_k,
                                   std::span<const float* const> prefix_v) {
  point(layer, at, prefix_k, prefix_v);
  dout_.move_to(at.dout);
  dq_.move_to(at.dq);
  dk_.move_to(at.dk);
  dv_.move_to(at.dv);
  args_.dout = dout_.get();
  args_.dq = dq_.get();
  args_.dk = dk_.get();
  args_.dv = dv_.get();
  return attention_->backward(call_.get(), args_);
}

}  // namespace ds
