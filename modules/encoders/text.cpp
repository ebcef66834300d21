// SPDX-License-Identifier: Apache-2.0
// Token ids to the rows of the model's embedding, times the task's weight of text.
#include <cmath>

#include "ds/plugin.hpp"
#include "kernels/ops.h"
#include "modules/device_ops.h"

namespace ds::modules {
namespace {

bool on_gpu(const ds_media& media) {
  return media.data != nullptr && media.data->device.type == DS_DEV_CUDA;
}

/// A media's ids, [tokens]; each is a row of a table of `vocab`, which only the host's can be
/// checked for.
std::span<const std::int32_t> checked_ids(const ds_media& media, std::int64_t vocab) {
  if (on_gpu(media)) return sdk::flat<const std::int32_t>(media.data, "ids", {-1}, DS_DEV_CUDA);
  const auto ids = sdk::flat<const std::int32_t>(media.data, "ids", {-1});
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab)
      throw sdk::error(DS_E_ARG, "ids[" + std::to_string(i) + "]: " + std::to_string(ids[i]) +
                                     ", expected 0 to " + std::to_string(vocab - 1));
  }
  return ids;
}

ds_media text_of(const ds_encode_args& a) {
  if (a.media == nullptr) throw sdk::error(DS_E_ARG, "media: missing");
  const ds_media media = sdk::widened(a.media);
  if (media.modality != DS_MOD_TEXT)
    throw sdk::error(DS_E_UNSUPPORTED,
                     "modality " + std::to_string(media.modality) + ", expected text (1)");
  if (!std::isfinite(media.weight))
    throw sdk::error(DS_E_NUMERIC, "weight: " + std::to_string(media.weight));
  return media;
}

/// 0 is "not set": as if the field did not exist (rule R1 of ds/plugin.h).
float weight_of(const ds_media& media) { return media.weight == 0 ? 1.0f : media.weight; }

constexpr std::string_view kTable = "model.embed_tokens.weight";

/// The embedding, [vocab, width]: packed, or plain FP32 rows.
struct Table {
  std::int64_t vocab, width;
  const ds_tensor& tensor;

  /// Looks at the shape only.
  explicit Table(const ds_encode_args& a) : tensor(*first(a)) {
    vocab = sdk::dim(&tensor, kTable, 2, 0);
    width = sdk::dim(&tensor, kTable, 2, 1);
    if (vocab <= 0 || width <= 0)
      throw sdk::error(DS_E_SHAPE, std::string(kTable) + ": " + sdk::shape_text(tensor.shape, 2) +
                                       ", expected positive sizes");
  }
  bool is_plain() const { return tensor.packing == DS_PACK_NONE; }
  std::span<const float> rows() const {
    return sdk::flat<const float>(tensor, kTable, {vocab, width});
  }
  /// On a GPU: rows of BF16, FP16 or FP32, each padded to 16 bytes.
  WeightView on_gpu(const Ops& ops) const {
    const bool f32 = tensor.dtype.code == DS_FLOAT && tensor.dtype.bits == 32;
    const bool f16 = tensor.dtype.code == DS_FLOAT && tensor.dtype.bits == 16;
    if (!f32 && !f16 && (tensor.dtype.code != DS_BFLOAT || tensor.dtype.bits != 16))
      throw refuse(DS_E_DTYPE, "type code " + std::to_string(tensor.dtype.code) +
                                   ", expected FP32, BF16 or FP16");
    if (tensor.device.type != DS_DEV_CUDA)
      throw refuse(DS_E_DEVICE, "in host memory, expected a GPU's");
    const auto half = f16 ? WeightFormat::kF16 : WeightFormat::kBF16;
    const auto format = f32 ? WeightFormat::kF32 : half;
    const std::int64_t row = ops.packed_bytes(format, 1, width) / (f32 ? 4 : 2);
    if (!is_plain() || tensor.strides[0] != row || tensor.strides[1] != 1)
      throw refuse(DS_E_SHAPE, "rows " + std::to_string(tensor.strides[0]) +
                                   " elements apart, expected " + std::to_string(row));
    return view(ops, format);
  }
  WeightView packed(const Ops& ops) const {
    if (tensor.packing != DS_PACK_PANEL_F32 && tensor.packing != DS_PACK_PANEL_BF16)
      throw refuse(DS_E_UNSUPPORTED,
                   "packing " + std::to_string(tensor.packing) +
                       ", expected plain rows (0) or panels of FP32 or BF16 (1 or 2)");
    if (tensor.device.type == DS_DEV_CUDA)
      throw refuse(DS_E_DEVICE, "on a GPU, expected host memory");
    const auto format =
        tensor.packing == DS_PACK_PANEL_F32 ? WeightFormat::kF32 : WeightFormat::kBF16;
    return view(ops, format);
  }

 private:
  static sdk::error refuse(ds_code code, const std::string& why) {
    return sdk::error(code, std::string(kTable) + ": " + why);
  }
  WeightView view(const Ops& ops, WeightFormat format) const {
    const auto need = static_cast<std::uint64_t>(ops.packed_bytes(format, vocab, width));
    if (tensor.byte_offset > tensor.bytes || tensor.bytes - tensor.byte_offset < need)
      throw refuse(DS_E_SHAPE, "buffer of " + std::to_string(tensor.bytes) +
                                   " bytes is too small, expected " + std::to_string(need));
    if (tensor.data == nullptr) throw refuse(DS_E_ARG, "no data");
    return {format, vocab, width, static_cast<const char*>(tensor.data) + tensor.byte_offset};
  }
  static const ds_tensor* first(const ds_encode_args& a) {
    if (a.tensors == nullptr || a.tensors[0] == nullptr)
      throw sdk::error(DS_E_ARG, std::string(kTable) + ": missing");
    return a.tensors[0];
  }
};

/// to[row] = weight * row_of(row), blocks of rows on the pool. `to` may be what row_of reads.
template <class RowOf>
void scale_rows(const ds_call& call, std::int64_t rows, std::int64_t width, float weight,
                RowOf&& row_of, float* to) {
  constexpr std::int64_t kBlock = 32;
  sdk::parallel_for(call, (rows + kBlock - 1) / kBlock, [&](std::int64_t block) {
    const std::int64_t end = std::min(rows, (block + 1) * kBlock);
    for (std::int64_t r = block * kBlock; r < end; ++r) {
      const float* from = row_of(r);
      for (std::int64_t i = 0; i < width; ++i) to[r * width + i] = weight * from[i];
    }
  });
}

}  // namespace

class Text {
 public:
  static constexpr std::string_view name = "text";
  static constexpr std::string_view summary = "token ids to rows of the model's embedding";
  static constexpr std::uint64_t caps =
      DS_CAP_CPU | DS_CAP_CUDA | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC;
  static constexpr std::uint32_t modalities = 1u << DS_MOD_TEXT;
  static constexpr std::array<ds_str, 1> tensor_names{sdk::str(kTable)};

  explicit Text(sdk::context) {}

  ds_plan plan(const ds_encode_args& a) const {
    const ds_media media = text_of(a);
    const Table table(a);
    ds_plan out{};
    out.shape[0] = sdk::dim(media.data, "ids", 1, 0);
    out.shape[1] = table.width;
    if (weight_of(media) != 1)  // backward: the scaled gradient
      out.workspace_bytes = static_cast<std::uint64_t>(out.shape[0] * out.shape[1]) * sizeof(float);
    return out;
  }

  void encode(const ds_call& call, const ds_encode_args& a) const {
    sdk::check_cancelled(call);
    const ds_media media = text_of(a);
    const Table table(a);
    const auto ids = checked_ids(media, table.vocab);
    const std::int64_t n = std::ssize(ids), width = table.width;
    const float weight = weight_of(media);
    const Ops& ops = ops_.of(call);
    if (call.stream != nullptr) {
      refuse_weight(weight);
      const auto out = sdk::flat<float>(a.out, "out", {n, width}, DS_DEV_CUDA);
      ops.embed(op_context(call), table.on_gpu(ops), n, ids.data(), out.data());
      return;
    }
    const auto out = sdk::flat<float>(a.out, "out", {n, width});
    if (table.is_plain()) {
      const auto rows = table.rows();
      scale_rows(
          call, n, width, weight, [&](std::int64_t r) { return &rows[ids[r] * width]; },
          out.data());
      return;
    }
    ops.embed(op_context(call), table.packed(ops), n, ids.data(), out.data());
    if (weight == 1) return;
    scale_rows(
        call, n, width, weight, [&](std::int64_t r) { return &out[r * width]; }, out.data());
  }

  /// dtensors[0] f32 [vocab, width] += weight * dout by row; rows of the same id in their order.
  void backward(const ds_call& call, const ds_encode_args& a) const {
    sdk::check_cancelled(call);
    const ds_media media = text_of(a);
    const Table table(a);
    if (a.dtensors == nullptr || a.dtensors[0] == nullptr) return;  // the embedding is frozen
    const auto ids = checked_ids(media, table.vocab);
    const std::int64_t n = std::ssize(ids), width = table.width;
    const std::int32_t device = call.stream != nullptr ? DS_DEV_CUDA : DS_DEV_CPU;
    const auto dout = sdk::flat<const float>(a.dout, "dout", {n, width}, device);
    const auto to = sdk::flat<float>(a.dtensors[0], "dtensors[0]", {table.vocab, width}, device);
    const float weight = weight_of(media);
    if (call.stream != nullptr) refuse_weight(weight);
    const float* dy = dout.data();
    if (weight != 1) {
      const auto scaled = sdk::workspace<float>(call, n * width);
      scale_rows(
          call, n, width, weight, [&](std::int64_t r) { return &dout[r * width]; }, scaled.data());
      dy = scaled.data();
    }
    ops_.of(call).embed_backward(op_context(call), n, width, ids.data(), dy, to.data());
  }

 private:
  static void refuse_weight(float weight) {
    if (weight != 1)
      throw sdk::error(DS_E_UNSUPPORTED,
                       "weight: " + std::to_string(weight) + " on a GPU, expected 1");
  }

  DeviceOps ops_;
};

}  // namespace ds::modules

DS_PLUGIN("org.driftstone.encoder-text", "1.0.0", "Apache-2.0", ds::modules::Text)
