// SPDX-License-Identifier: Apache-2.0
#include "engine/text_encoder.h"

#include "engine/model.h"

namespace ds {
namespace {

constexpr std::string_view kEmbedding = "model.embed_tokens.weight";

}  // namespace

TextEncoder::TextEncoder(std::shared_ptr<const PluginInstance> plugin, uint64_t generation)
    : PluginGeneration(std::move(plugin), generation), table_(plugin_->table<ds_encoder>()) {}

Result<std::shared_ptr<const TextEncoder>> TextEncoder::make(
    std::shared_ptr<const PluginInstance> plugin, uint64_t generation) {
  std::shared_ptr<const TextEncoder> out(new TextEncoder(std::move(plugin), generation));
  const std::string name(out->name());
  if ((out->table_.modalities & (1u << DS_MOD_TEXT)) == 0)
    return invalid("encoder " + name + ": does not read text");
  for (uint32_t i = 0; i < out->table_.tensor_count; ++i) {
    const std::string_view wanted = text_of(out->table_.tensor_names[i]);
    if (wanted != kEmbedding || i > 0)
      return invalid("encoder " + name + ": reads the tensor \"" + std::string(wanted) +
                     "\"; the daemon gives an encoder of text " + std::string(kEmbedding) +
                     ", once");
  }
  return out;
}

Result<ds_plan> TextEncoding::plan(const TextEncoder& encoder, int64_t rows, int64_t width) const {
  ds_plan plan{};
  plan.size = sizeof plan;
  ds_status st{};
  const PluginRunning running(encoder.plugin_->who());
  DS_TRY(encoder.judge(encoder.table_.plan(encoder.plugin_->handle(), &args_, &plan, &st), st));
  plan = full_struct(&plan);
  const auto text = [](int64_t n) { return std::to_string(n); };
  if (plan.shape[0] != rows || plan.shape[1] != width)
    return Status(Code::kPlugin, "encoder " + std::string(encoder.name()) + ": plans rows [" +
                                     text(plan.shape[0]) + ", " + text(plan.shape[1]) + "] of " +
                                     text(rows) + " tokens, expected [" + text(rows) + ", " +
                                     text(width) + "]");
  DS_TRY(encoder.check_room(plan));
  return plan;
}

Status TextEncoding::run(const TextEncoder& encoder,
                         ds_code (*function)(ds_instance*, const ds_call*, const ds_encode_args*,
                                             ds_status*)) {
  const ds_call call = call_.get();
  const auto held = encoder.plugin_->one_call();
  ds_status st;
  st.len = 0;
  return encoder.judge(function(encoder.plugin_->handle(), &call, &args_, &st), st);
}

Status TextEncoding::forward(const TextEncoder& encoder, const Ops& ops, const OpContext& context,
                             const BaseWeights& base, std::span<const int32_t> ids, float* out,
                             bool train) {
  const WeightView& embedding = base.embedding().view;
  const ds_device device = device_of(context);
  const int64_t rows = std::ssize(ids), width = embedding.k;
  ids_.set(ids.data(), kAbiI32, {rows}, device);
  out_.set(out, kAbiF32, {rows, width}, device);
  show_packed(ops, context, embedding, table_);
  tensors_[0] = table_.get();
  media_ = {};
  media_.size = sizeof media_;
  media_.modality = DS_MOD_TEXT;
  media_.data = ids_.get();
  args_ = {};
  args_.size = sizeof args_;
  args_.flags = train ? DS_ENCODE_TRAIN : 0;
  args_.media = &media_;
  args_.tensors = tensors_.data();
  DS_ASSIGN(const ds_plan planned, plan(encoder, rows, width));
  DS_TRY(call_.begin(ops, context, planned.workspace_bytes));
  DS_TRY(saved_.grow(ops, static_cast<size_t>(planned.saved_bytes)));
  args_.saved = saved_.data();
  args_.out = out_.get();
  return run(encoder, encoder.table_.encode);
}

Status TextEncoding::backward(const TextEncoder& encoder, const float* dout, float* embedding) {
  if (!encoder.trains()) return {};
  const ds_tensor& out = *out_.get();
  const ds_tensor& table = *table_.get();
  dout_.set(dout, kAbiF32, {out.shape[0], out.shape[1]}, out.device);
  dtable_.set(embedding, kAbiF32, {table.shape[0], table.shape[1]}, out.device);
  dtensors_[0] = dtable_.get();
  args_.dout = dout_.get();
  args_.dtensors = dtensors_.data();
  return run(encoder, encoder.table_.backward);
}

}  // namespace ds
