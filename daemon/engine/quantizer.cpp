// SPDX-License-Identifier: Apache-2.0
#include "engine/quantizer.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>

#include "plugin/tensor_view.h"

namespace ds {
namespace {

static_assert(sizeof(LoraEntry) == sizeof(ds_lora_entry));
static_assert(offsetof(LoraEntry, b) == offsetof(ds_lora_entry, b));
static_assert(offsetof(LoraEntry, scale) == offsetof(ds_lora_entry, scale));

/// The low-rank parts of a call in the ABI's form.
struct AbiSlots {
  std::array<ds_lora_pair, kMaxLoraSlots * kMaxFusedWeights> pairs{};
  std::array<const ds_lora_pair*, kMaxLoraSlots * kMaxFusedWeights> at{};
  std::vector<std::unique_ptr<TensorView>> tensors;
  ds_lora_slots slots{};

  AbiSlots(const Ops& ops, const OpContext& context, const LoraSlots& from, int n_weights) {
    for (int s = 0; s < from.n_slots; ++s) {
      for (int w = 0; w < n_weights; ++w) {
        const auto i = static_cast<size_t>(s * n_weights + w);
        const LoraPair& pair = from.pair[s][w];
        pairs[i].size = sizeof(ds_lora_pair);
        pairs[i].scale = pair.scale;
        at[i] = &pairs[i];
        if (pair.a.data == nullptr) continue;
        pairs[i].a = tensor_of(ops, context, pair.a);
        pairs[i].b = tensor_of(ops, context, pair.b);
      }
    }
    slots.size = sizeof slots;
    slots.n_slots = static_cast<uint32_t>(from.n_slots);
    slots.slot_of_row = from.slot_of_row;
    slots.pairs = at.data();
    slots.t = from.t;
    slots.table = reinterpret_cast<const ds_lora_entry*>(from.table);
    slots.table_dtype = element_of(from.table_format);
  }

 private:
  const ds_tensor* tensor_of(const Ops& ops, const OpContext& context, const WeightView& w) {
    auto& view = tensors.emplace_back(std::make_unique<TensorView>());
    show_packed(ops, context, w, *view);
    return view->get();
  }
};

void prepare_for(const Ops& ops, const OpContext& context, LinearArgs& args, Buffer& room) {
  const WeightView& w = args.w[0];
  const int64_t bytes = ops.prepared_bytes(w.format, args.rows, w.k);
  if (bytes == 0) return;
  ops.prepare(context, args.rows, w.k, args.x, args.x_stride,
              {room.at_least(static_cast<size_t>(bytes)), w.format});
  args.x_prepared = room.data();
}

/// y_i += scale * B_i (A_i x) of each row's slot, by two products.
void add_low_rank(const Ops& ops, const OpContext& context, const LinearArgs& args,
                  LinearScratch& scratch) {
  const LoraSlots& lora = *args.lora;
  for (int w = 0; w < args.n_weights; ++w) {
    float* kept = lora.t + static_cast<int64_t>(w) * args.rows * kLoraRank;
    std::fill_n(kept, args.rows * kLoraRank, 0.0f);
    for (int s = 0; s < lora.n_slots; ++s) {
      const LoraPair& pair = lora.pair[s][w];
      if (pair.a.data == nullptr) continue;
      float* t = reinterpret_cast<float*>(
          scratch.lora.at_least(static_cast<size_t>(args.rows * kLoraRank) * sizeof(float)));
      LinearArgs down;
      down.rows = args.rows;
      down.x = args.x, down.x_stride = args.x_stride;
      down.n_weights = 1;
      down.w[0] = pair.a;
      down.y[0] = t, down.y_stride[0] = kLoraRank;
      prepare_for(ops, context, down, scratch.prepared);
      ops.linear(context, down);
      for (int64_t r = 0; r < args.rows; ++r) {
        const bool mine = lora.slot_of_row[r] == s;
        for (int64_t i = 0; i < kLoraRank; ++i) {
          float& v = t[r * kLoraRank + i];
          if (mine) kept[r * kLoraRank + i] = v;
          v = mine ? v * pair.scale : 0.0f;
        }
      }
      LinearArgs up;
      up.rows = args.rows;
      up.x = t, up.x_stride = kLoraRank;
      up.n_weights = 1;
      up.w[0] = pair.b;
      up.y[0] = args.y[w], up.y_stride[0] = args.y_stride[w];
      up.epilogue = Epilogue::kResidual, up.residual = args.y[w];
      prepare_for(ops, context, up, scratch.prepared);
      ops.linear(context, up);
    }
  }
}

void add_bias(const LinearArgs& args) {
  for (int w = 0; w < args.n_weights; ++w) {
    if (args.bias[w] == nullptr) continue;
    for (int64_t r = 0; r < args.rows; ++r) {
      float* row = args.y[w] + r * args.y_stride[w];
      for (int64_t i = 0; i < args.w[w].n; ++i) row[i] += args.bias[w][i];
    }
  }
}

/// The rest of a step's q, k and v in the ABI's form.
ds_linear_rope abi_rope(const RopeAppendArgs& from) {
  ds_linear_rope out{};
  out.size = sizeof out;
  out.heads = static_cast<uint32_t>(from.n_heads);
  out.kv_heads = static_cast<uint32_t>(from.kv.n_kv_heads);
  out.head_dim = static_cast<uint32_t>(from.kv.head_dim);
  out.cos = from.cos, out.sin = from.sin;
  out.positions = from.positions, out.slots = from.slots;
  out.k_pages = from.kv.k, out.v_pages = from.kv.v;
  out.kv_dtype = kv_element(from.kv.dtype);
  return out;
}

uint32_t wanted_parts(const LinearArgs& args) {
  uint32_t wanted = 0;
  if (args.lora != nullptr) wanted |= DS_LINEAR_LORA;
  if (std::any_of(args.bias, args.bias + args.n_weights,
                  [](const float* b) { return b != nullptr; }))
    wanted |= DS_LINEAR_BIAS;
  if (args.epilogue == Epilogue::kResidual) wanted |= DS_LINEAR_RESIDUAL;
  if (args.epilogue == Epilogue::kSwiglu) wanted |= DS_LINEAR_SWIGLU;
  return wanted;
}

void point_to_own(QuantWeight& weight, int64_t n, int64_t k) {
  weight.view.size = sizeof(ds_qweight);
  weight.view.n = n, weight.view.k = k;
  weight.view.format = &weight.format;
  weight.view.packed = weight.packed.data();
  weight.view.scales = weight.scales.data();
  weight.view.zeros = weight.zeros.data();
}

}  // namespace

Result<std::unique_ptr<QuantWeight>> copy_to(const Ops& ops, const OpContext& context,
                                             const QuantWeight& weight) {
  auto out = std::make_unique<QuantWeight>();
  out->format = weight.format;
  out->on_gpu = !ops.host_memory;
  const auto copy = [&](const Buffer& from, Buffer& to) -> Status {
    if (from.bytes() == 0) return {};
    DS_ASSIGN(to, Buffer::make(ops, from.bytes()));
    ops.upload(context, to.data(), from.data(), static_cast<int64_t>(from.bytes()));
    return {};
  };
  DS_TRY(copy(weight.packed, out->packed));
  DS_TRY(copy(weight.scales, out->scales));
  DS_TRY(copy(weight.zeros, out->zeros));
  point_to_own(*out, weight.view.n, weight.view.k);
  return out;
}

uint64_t next_serial() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

Quantizer::Quantizer(std::shared_ptr<const PluginInstance> plugin, uint64_t generation)
    : PluginGeneration(std::move(plugin), generation),
      table_(plugin_->table<ds_quantizer>()),
      serial_(next_serial()) {}

bool Quantizer::multiplies(const ds_qformat& format, bool on_gpu) const {
  if (table_.linear == nullptr || !on_gpu) return table_.linear != nullptr;
  constexpr uint32_t kAll = DS_LINEAR_RESIDUAL | DS_LINEAR_SWIGLU | DS_LINEAR_LORA | DS_LINEAR_BIAS;
  return (plugin_->component().caps & DS_CAP_CUDA) != 0 && (format.fused & kAll) == kAll;
}

Result<LinearScratch::Plan> Quantizer::plan(const ds_qformat& format, int64_t rows, int64_t k,
                                            LinearScratch& scratch) const {
  for (const LinearScratch::Plan& p : scratch.plans) {
    if (p.quantizer == serial_ && p.rows == rows && p.k == k && p.layout == format.layout_id)
      return p;
  }
  ds_plan asked{};
  asked.size = sizeof asked;
  if (table_.plan != nullptr) {
    ds_status st{};
    DS_TRY(
        plugin_status(name(), table_.plan(plugin_->handle(), &format, rows, k, &asked, &st), st));
    asked = full_struct(&asked);
  }
  constexpr size_t kKept = 8;
  if (scratch.plans.size() == kKept) scratch.plans.erase(scratch.plans.begin());
  scratch.plans.push_back(
      {serial_, rows, k, format.layout_id, asked.workspace_bytes, asked.prepared_bytes});
  return scratch.plans.back();
}

Result<ds_qformat> Quantizer::format(int64_t n, int64_t k) const {
  ds_qformat out{};
  out.size = sizeof out;
  const PluginRunning running(plugin_->who());
  ds_status st{};
  DS_TRY(plugin_status(name(), table_.format(plugin_->handle(), n, k, &out, &st), st));
  out = full_struct(&out);
  const auto limit = static_cast<uint64_t>(n * k) * 8 + 4096;  // twice FP32 is no quantization
  if (out.packed_bytes > limit || out.scale_bytes > limit || out.zero_bytes > limit)
    return Status(Code::kPlugin, std::string(name()) + ": format of a " + std::to_string(n) +
                                     " x " + std::to_string(k) + " matrix wants " +
                                     std::to_string(out.packed_bytes) + " bytes");
  return out;
}

Status Quantizer::observe(const OpContext& context, const std::string& weight_name, int64_t rows,
                          int64_t k, const float* x) const {
  const TensorView inputs(x, kAbiF32, {rows, k});
  const ds_call call = host_call(context.parallel);
  ds_status st{};
  const auto held = plugin_->one_call();
  return plugin_status(
             name(),
             table_.observe(plugin_->handle(), &call, abi_str(weight_name), inputs.get(), &st), st)
      .in(weight_name);
}

Result<std::unique_ptr<QuantWeight>> Quantizer::quantize(const OpContext& context,
                                                         const std::string& weight_name, int64_t n,
                                                         int64_t k, const float* w) const {
  auto out = std::make_unique<QuantWeight>();
  DS_ASSIGN(out->format, format(n, k));
  out->packed = Buffer(out->format.packed_bytes);
  out->scales = Buffer(out->format.scale_bytes);
  out->zeros = Buffer(out->format.zero_bytes);
  point_to_own(*out, n, k);
  const TensorView source(w, kAbiF32, {n, k});
  const ds_call call = host_call(context.parallel);
  ds_status st{};
  const auto held = plugin_->one_call();
  DS_TRY(plugin_status(name(),
                       table_.quantize(plugin_->handle(), &call, abi_str(weight_name), source.get(),
                                       &out->view, &st),
                       st)
             .in(weight_name));
  return out;
}

Status Quantizer::dequantize(const OpContext& context, const QuantWeight& weight, float* w) const {
  const int64_t n = weight.view.n, k = weight.view.k;
  const OpContext where = weight.on_gpu ? context : OpContext{context.parallel};
  TensorView out;
  out.set(w, kAbiF32, {n, k}, device_of(where));
  ds_stream stream;
  const ds_call call = device_call(where, stream);
  ds_status st{};
  const auto held = plugin_->one_call();
  return plugin_status(
      name(), table_.dequantize(plugin_->handle(), &call, &weight.view, out.get(), &st), st);
}

Result<bool> Quantizer::accepts(const QuantWeight& weight) const {
  DS_ASSIGN(const ds_qformat own, format(weight.view.n, weight.view.k));
  const ds_qformat& had = weight.format;
  return own.layout_id == had.layout_id && own.bits == had.bits && own.group == had.group &&
         own.packed_bytes == had.packed_bytes && own.scale_bytes == had.scale_bytes &&
         own.zero_bytes == had.zero_bytes && own.symmetric == had.symmetric &&
         own.fused == had.fused && multiplies(own, weight.on_gpu);
}

Status Quantizer::run(const Ops& ops, const OpContext& context,
                      std::span<const QuantWeight* const> weights, const LinearArgs& args,
                      uint32_t fused, LinearScratch& scratch) const {
  const ds_qformat& format = weights[0]->format;
  ds_stream stream;
  ds_call call = device_call(context, stream);
  ds_status st;
  st.len = 0;
  const auto held = plugin_->one_call();
  DS_ASSIGN(const LinearScratch::Plan plan, this->plan(format, args.rows, args.w[0].k, scratch));
  DS_TRY(scratch.workspace.grow(ops, plan.workspace_bytes));
  call.workspace = scratch.workspace.data();
  call.workspace_bytes = plan.workspace_bytes;
  std::array<const ds_qweight*, kMaxFusedWeights> views{};
  for (size_t i = 0; i < weights.size(); ++i) views[i] = &weights[i]->view;
  ds_linear_args out{};
  out.size = sizeof out;
  out.epilogue = fused & (DS_LINEAR_RESIDUAL | DS_LINEAR_SWIGLU);
  out.rows = args.rows;
  out.x = args.x;
  out.x_stride = args.x_stride;
  out.weights = views.data();
  out.bias = args.bias;
  static constexpr const float* kNoBias[kMaxFusedWeights] = {};
  if ((fused & DS_LINEAR_BIAS) == 0) out.bias = kNoBias;
  out.y = args.y;
  out.y_stride = args.y_stride;
  out.residual = (fused & DS_LINEAR_RESIDUAL) != 0 ? args.residual : nullptr;
  out.n_weights = static_cast<uint32_t>(args.n_weights);
  std::unique_ptr<AbiSlots> slots;
  if ((fused & DS_LINEAR_LORA) != 0) {
    slots = std::make_unique<AbiSlots>(ops, context, *args.lora, args.n_weights);
    out.lora = &slots->slots;
  }
  out.norm = args.norm;
  out.norm_eps = args.norm_eps;
  ds_linear_rope rope;
  if (args.rope != nullptr) {
    rope = abi_rope(*args.rope);
    out.rope = &rope;
  }
  if (plan.prepared_bytes > 0 && table_.prepare != nullptr && args.norm == nullptr) {
    DS_TRY(scratch.prepared.grow(ops, plan.prepared_bytes));
    void* prepared = scratch.prepared.data();
    const ds_code code = table_.prepare(plugin_->handle(), &call, &format, args.rows, args.w[0].k,
                                        args.x, args.x_stride, prepared, &st);
    if (code != DS_OK) return plugin_status(name(), code, st);
    out.x_prepared = prepared;
  }
  const ds_code code = table_.linear(plugin_->handle(), &call, &out, &st);
  return code == DS_OK ? Status() : plugin_status(name(), code, st);
}

Status Quantizer::linear(const Ops& ops, const OpContext& context,
                         std::span<const QuantWeight* const> weights, const LinearArgs& args,
                         LinearScratch& scratch) const {
  if (context.stream == nullptr && plugin_->recorded().due(CallSort::kLinear))
    record(ops, context, *weights[0], args);
  const uint32_t wanted = wanted_parts(args);
  uint32_t fused = wanted & weights[0]->format.fused;
  if (fused == wanted) return run(ops, context, weights, args, fused, scratch);
  // Order of the fused kernels: product, low-rank part, bias, epilogue. What comes after the first
  // part that is missing is done here, too.
  if ((wanted & ~fused & DS_LINEAR_LORA) != 0) fused &= ~DS_LINEAR_BIAS;
  fused &= DS_LINEAR_LORA | DS_LINEAR_BIAS;
  LinearArgs plain = args;
  plain.epilogue = Epilogue::kNone;
  const bool swiglu = args.epilogue == Epilogue::kSwiglu;
  const int64_t n = args.w[0].n;
  const bool aside = args.epilogue == Epilogue::kResidual && args.residual == args.y[0];
  if (swiglu || aside) {  // a place for the second product, or beside the residual
    const size_t floats = static_cast<size_t>(args.rows * n) * (swiglu ? 2 : 1);
    auto* room = reinterpret_cast<float*>(scratch.up.at_least(floats * sizeof(float)));
    plain.y[0] = room, plain.y_stride[0] = n;
    if (swiglu) plain.y[1] = room + args.rows * n, plain.y_stride[1] = n;
  }
  DS_TRY(run(ops, context, weights, plain, fused, scratch));
  if ((wanted & ~fused & DS_LINEAR_LORA) != 0) add_low_rank(ops, context, plain, scratch);
  if ((wanted & ~fused & DS_LINEAR_BIAS) != 0) add_bias(plain);
  for (int64_t r = 0; r < args.rows && args.epilogue != Epilogue::kNone; ++r) {
    float* y = args.y[0] + r * args.y_stride[0];
    const float* made = plain.y[0] + r * plain.y_stride[0];
    if (swiglu) {
      ops.swiglu(context, {.rows = 1, .d = n, .gate = made, .up = plain.y[1] + r * n, .y = y});
    } else {
      const float* residual = args.residual + r * args.y_stride[0];
      for (int64_t i = 0; i < n; ++i) y[i] = residual[i] + made[i];
    }
  }
  return {};
}

}  // namespace ds
