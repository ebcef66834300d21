// SPDX-License-Identifier: Apache-2.0
// What is kept of a call that is to be recorded (plugin/recorded_calls.h): a part that answers on
// its own, small enough to be copied on the engine's thread.
#include <algorithm>
#include <array>
#include <cstring>

#include "engine/attention.h"
#include "engine/quantizer.h"

namespace ds {
namespace {

constexpr int64_t kMostRows = 64;                   // of an attention call
constexpr size_t kMostPageBytes = size_t{4} << 20;  // of keys and values together
constexpr int64_t kMostLinearRows = 8;
constexpr int64_t kMostWeightRows = 64, kMostWeights = 4 << 20;  // a whole matrix is dequantized

std::vector<float> copy_floats(const float* from, int64_t n) { return {from, from + n}; }

}  // namespace

/// One sequence's last rows: their bits depend neither on other sequences nor on earlier rows'
/// calls.
void Attention::record(const ds_attn_args& args, bool decode) const {
  const ds_kv_view& kv = *args.kv;
  const int64_t heads = args.q->shape[1], dim = args.q->shape[2];
  const size_t page_bytes =
      static_cast<size_t>(kv.k_pages->shape[1] * kv.k_pages->shape[2] * kv.k_pages->shape[3]) *
      kv.k_pages->dtype.bits / 8;
  const auto* lengths = static_cast<const int32_t*>(kv.lengths->data);
  const auto* rows = static_cast<const int32_t*>(args.rows->data);
  const auto pages_of = [&](size_t b) {
    return (static_cast<size_t>(lengths[b]) + kv.page_tokens - 1) / kv.page_tokens;
  };
  size_t chosen = args.batch;  // the longest that fits
  for (size_t b = 0; b < args.batch; ++b) {
    if (pages_of(b) * page_bytes * 2 <= kMostPageBytes && rows[b + 1] > rows[b] &&
        (chosen == args.batch || lengths[b] > lengths[chosen]))
      chosen = b;
  }
  if (chosen == args.batch || args.global_idx != nullptr || kv.k_scale != nullptr) return;
  AttentionCall call;
  call.decode = decode;
  call.layer = args.layer;
  call.rows = std::min<int64_t>(rows[chosen + 1] - rows[chosen], kMostRows);
  call.keys = lengths[chosen];
  call.heads = heads, call.kv_heads = kv.k_pages->shape[1], call.dim = dim;
  call.scale = args.scale, call.softcap = args.softcap;
  call.element = kv.k_pages->dtype;
  call.page_tokens = kv.page_tokens;
  const int64_t first = (rows[chosen + 1] - call.rows) * heads * dim, n = call.rows * heads * dim;
  call.q = copy_floats(static_cast<const float*>(args.q->data) + first, n);
  const size_t pages = pages_of(chosen);
  call.k = Buffer(pages * page_bytes);
  call.v = Buffer(pages * page_bytes);
  const auto* table = static_cast<const int32_t*>(kv.block_table->data) +
                      chosen * static_cast<size_t>(kv.block_table->shape[1]);
  for (size_t p = 0; p < pages; ++p) {
    const size_t from = static_cast<size_t>(table[p]) * page_bytes;
    std::memcpy(call.k.data() + p * page_bytes,
                static_cast<const std::byte*>(kv.k_pages->data) + from, page_bytes);
    std::memcpy(call.v.data() + p * page_bytes,
                static_cast<const std::byte*>(kv.v_pages->data) + from, page_bytes);
  }
  CallOutput output;
  output.values = copy_floats(static_cast<const float*>(args.out->data) + first, n);
  plugin_->recorded().keep({std::move(call)}, std::move(output));
}

/// The product alone, of the first rows of x and of the first weight's first rows: without what the
/// layer adds to it, which is the host's.
void Quantizer::record(const Ops& ops, const OpContext& context, const QuantWeight& weight,
                       const LinearArgs& args) const {
  const int64_t n = weight.view.n, k = weight.view.k;
  if (n * k > kMostWeights) return;
  LinearCall call;
  call.rows = std::min(args.rows, kMostLinearRows);
  call.n = std::min(n, kMostWeightRows), call.k = k;
  for (int64_t r = 0; r < call.rows; ++r)
    call.x.insert(call.x.end(), args.x + r * args.x_stride, args.x + r * args.x_stride + k);
  call.w.resize(static_cast<size_t>(n * k));
  std::vector<float> y(static_cast<size_t>(call.rows * n));
  LinearArgs plain;
  plain.rows = call.rows;
  plain.x = call.x.data(), plain.x_stride = k;
  plain.n_weights = 1;
  plain.w[0] = args.w[0];
  plain.y[0] = y.data(), plain.y_stride[0] = n;
  LinearScratch scratch;
  const std::array<const QuantWeight*, 1> weights = {&weight};
  // A failure here fails the layer's own call, too, which says so.
  if (!dequantize(context, weight, call.w.data()).ok() ||
      !run(ops, context, weights, plain, 0, scratch).ok())
    return;
  call.w.resize(static_cast<size_t>(call.n * k));
  CallOutput output;
  for (int64_t r = 0; r < call.rows; ++r)
    output.values.insert(output.values.end(), y.begin() + r * n, y.begin() + r * n + call.n);
  plugin_->recorded().keep({std::move(call)}, std::move(output));
}

}  // namespace ds
