// SPDX-License-Identifier: Apache-2.0
#include "plugin/replayed_calls.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/pool.h"
#include "plugin/tensor_view.h"
#include "plugin/tool_run.h"

namespace ds {
namespace {

constexpr uint64_t kMemoryLimit = uint64_t{256} << 20;  // of what a plan may ask for here

Result<Buffer> planned(const PluginInstance& plugin, uint64_t bytes) {
  if (bytes > kMemoryLimit)
    return Status(Code::kPlugin, std::string(plugin.name()) + ": plans " + std::to_string(bytes) +
                                     " bytes for a recorded call");
  return Buffer::zeros(static_cast<size_t>(bytes));
}

class ReplayedAttention final : public ReplayedCall {
 public:
  ReplayedAttention(const PluginInstance& plugin, const AttentionCall& from)
      : plugin_(plugin), table_(plugin.table<ds_attention>()), from_(from) {}

  Status set_up() {
    const int64_t pages = (from_.keys + from_.page_tokens - 1) / from_.page_tokens;
    table_ids_.resize(static_cast<size_t>(pages));
    for (size_t i = 0; i < table_ids_.size(); ++i) table_ids_[i] = static_cast<int32_t>(i);
    for (auto* t : {&k_, &v_})
      t->set(t == &k_ ? from_.k.data() : from_.v.data(), from_.element,
             {pages, from_.kv_heads, from_.page_tokens, from_.dim});
    ids_view_.set(table_ids_.data(), kAbiI32, {1, pages});
    rows_view_.set(rows_, kAbiI32, {2});
    length_view_.set(&length_, kAbiI32, {1});
    kv_.size = sizeof kv_;
    kv_.page_tokens = from_.page_tokens;
    kv_.k_pages = k_.get(), kv_.v_pages = v_.get();
    kv_.block_table = ids_view_.get(), kv_.lengths = length_view_.get();
    args_.size = sizeof args_;
    args_.batch = 1, args_.layer = from_.layer;
    args_.rows = rows_view_.get(), args_.kv = &kv_;
    args_.scale = from_.scale, args_.softcap = from_.softcap;
    DS_TRY(point(from_.rows, from_.keys, from_.q.data()));
    DS_ASSIGN(extra_, planned(plugin_, extra_bytes_ * static_cast<uint64_t>(pages)));
    if (extra_bytes_ == 0) return {};
    extra_view_.set(extra_.data(), kAbiU8, {pages, static_cast<int64_t>(extra_bytes_)});
    kv_.page_extra = extra_view_.get();
    return from_.keys > from_.rows ? know_earlier_rows() : Status();
  }

  Status run() override {
    const auto function = from_.decode && table_.decode != nullptr ? table_.decode : table_.prefill;
    ds_status st{};
    const auto held = plugin_.one_call();
    return plugin_status(plugin_.name(), function(plugin_.handle(), &call_, &args_, &st), st);
  }
  CallOutput take_output() override { return {std::move(out_), {}, Json::array()}; }

 private:
  /// The last `rows` of `keys` positions are computed from q; workspace is planned for them.
  Status point(int64_t rows, int64_t keys, const float* q) {
    rows_[1] = static_cast<int32_t>(rows);
    length_ = static_cast<int32_t>(keys);
    out_.assign(static_cast<size_t>(rows * from_.heads * from_.dim), NAN);
    q_.set(q, kAbiF32, {rows, from_.heads, from_.dim});
    out_view_.set(out_.data(), kAbiF32, {rows, from_.heads, from_.dim});
    args_.q = q_.get(), args_.out = out_view_.get();
    args_.max_rows = static_cast<uint32_t>(rows), args_.max_keys = static_cast<uint32_t>(keys);
    ds_plan plan{};
    plan.size = sizeof plan;
    ds_status st{};
    const PluginRunning running(plugin_.who());
    DS_TRY(plugin_status(plugin_.name(), table_.plan(plugin_.handle(), &args_, &plan, &st), st));
    plan = full_struct(&plan);
    extra_bytes_ = (plan.page_extra_bytes + 7) / 8 * 8;
    DS_ASSIGN(workspace_, planned(plugin_, plan.workspace_bytes));
    call_ = host_call(serial_parallel());
    call_.workspace = workspace_.data();
    call_.workspace_bytes = plan.workspace_bytes;
    return {};
  }

  /// What stands beside the pages comes from the rows before. Their keys are kept, their queries
  /// are not: zeros.
  Status know_earlier_rows() {
    const int64_t rows = from_.keys - from_.rows;
    const std::vector<float> q(static_cast<size_t>(rows * from_.heads * from_.dim));
    DS_TRY(point(rows, rows, q.data()));
    {
      ds_status st{};
      const auto held = plugin_.one_call();
      const ds_code code = table_.prefill(plugin_.handle(), &call_, &args_, &st);
      DS_TRY(plugin_status(plugin_.name(), code, st));
    }
    return point(from_.rows, from_.keys, from_.q.data());
  }

  const PluginInstance& plugin_;
  const ds_attention table_;
  const AttentionCall& from_;
  std::vector<int32_t> table_ids_;
  int32_t rows_[2] = {0, 0}, length_ = 0;
  std::vector<float> out_;
  Buffer workspace_, extra_;
  uint64_t extra_bytes_ = 0;
  TensorView q_, out_view_, k_, v_, ids_view_, rows_view_, length_view_, extra_view_;
  ds_kv_view kv_{};
  ds_attn_args args_{};
  ds_call call_{};
};

/// Quantizes the weights anew, then multiplies; without linear() it dequantizes, as a host does.
class ReplayedLinear final : public ReplayedCall {
 public:
  ReplayedLinear(const PluginInstance& plugin, const LinearCall& from)
      : plugin_(plugin), table_(plugin.table<ds_quantizer>()), from_(from) {}

  Status set_up() {
    weights_.assign(from_.w.size(), NAN);
    weights_view_.set(weights_.data(), kAbiF32, {from_.n, from_.k});
    DS_TRY(quantize());
    DS_TRY(dequantize());
    y_.assign(static_cast<size_t>(from_.rows * from_.n), NAN);
    if (table_.linear == nullptr) return {};
    ds_plan plan{};
    plan.size = sizeof plan;
    if (table_.plan != nullptr) {
      ds_status st{};
      const PluginRunning running(plugin_.who());
      const ds_code code = table_.plan(plugin_.handle(), &format_, from_.rows, from_.k, &plan, &st);
      DS_TRY(plugin_status(plugin_.name(), code, st));
      plan = full_struct(&plan);
    }
    DS_ASSIGN(workspace_, planned(plugin_, plan.workspace_bytes));
    DS_ASSIGN(prepared_, planned(plugin_, plan.prepared_bytes));
    call_.workspace = workspace_.data();
    call_.workspace_bytes = plan.workspace_bytes;
    args_.size = sizeof args_;
    args_.rows = from_.rows;
    args_.x = from_.x.data(), args_.x_stride = from_.k;
    args_.weights = &weight_at_, args_.bias = &no_bias_, args_.n_weights = 1;
    args_.y = &y_at_, args_.y_stride = &from_.n;
    y_at_ = y_.data();
    return {};
  }

  Status run() override {
    if (table_.linear == nullptr) return dequantize();
    ds_status st{};
    const auto held = plugin_.one_call();
    if (prepared_.bytes() > 0 && table_.prepare != nullptr) {
      const ds_code code = table_.prepare(plugin_.handle(), &call_, &format_, from_.rows, from_.k,
                                          from_.x.data(), from_.k, prepared_.data(), &st);
      DS_TRY(plugin_status(plugin_.name(), code, st));
      args_.x_prepared = prepared_.data();
    }
    return plugin_status(plugin_.name(), table_.linear(plugin_.handle(), &call_, &args_, &st), st);
  }

  CallOutput take_output() override {
    if (table_.linear == nullptr) {
      for (int64_t r = 0; r < from_.rows; ++r) {
        for (int64_t i = 0; i < from_.n; ++i) {
          double sum = 0;
          for (int64_t j = 0; j < from_.k; ++j)
            sum += double(from_.x[static_cast<size_t>(r * from_.k + j)]) *
                   weights_[static_cast<size_t>(i * from_.k + j)];
          y_[static_cast<size_t>(r * from_.n + i)] = static_cast<float>(sum);
        }
      }
    }
    return {std::move(y_), std::move(weights_), Json::array()};
  }
  double promised() const override { return format_.rel_tol; }

 private:
  Status quantize() {
    format_.size = sizeof format_;
    ds_status st{};
    const auto held = plugin_.one_call();
    ds_code code = table_.format(plugin_.handle(), from_.n, from_.k, &format_, &st);
    DS_TRY(plugin_status(plugin_.name(), code, st));
    format_ = full_struct(&format_);
    DS_ASSIGN(packed_, planned(plugin_, format_.packed_bytes));
    DS_ASSIGN(scales_, planned(plugin_, format_.scale_bytes));
    DS_ASSIGN(zeros_, planned(plugin_, format_.zero_bytes));
    weight_.size = sizeof weight_;
    weight_.n = from_.n, weight_.k = from_.k;
    weight_.format = &format_;
    weight_.packed = packed_.data();
    weight_.scales = scales_.data();
    weight_.zeros = zeros_.data();
    const TensorView w(from_.w.data(), kAbiF32, {from_.n, from_.k});
    code = table_.quantize(plugin_.handle(), &call_, abi_str("recorded"), w.get(), &weight_, &st);
    return plugin_status(plugin_.name(), code, st);
  }
  Status dequantize() {
    ds_status st{};
    const auto held = plugin_.one_call();
    const ds_code code =
        table_.dequantize(plugin_.handle(), &call_, &weight_, weights_view_.get(), &st);
    return plugin_status(plugin_.name(), code, st);
  }

  const PluginInstance& plugin_;
  const ds_quantizer table_;
  const LinearCall& from_;
  ds_qformat format_{};
  ds_qweight weight_{};
  const ds_qweight* weight_at_ = &weight_;
  const float* no_bias_ = nullptr;
  float* y_at_ = nullptr;
  std::vector<float> y_, weights_;
  Buffer packed_, scales_, zeros_, workspace_, prepared_;
  TensorView weights_view_;
  ds_linear_args args_{};
  ds_call call_ = host_call(serial_parallel());
};

class ReplayedTool final : public ReplayedCall {
 public:
  ReplayedTool(const PluginInstance& plugin, const ToolCall& from, int64_t deadline_ns)
      : plugin_(plugin), request_{from.language, from.path, from.text, deadline_ns, nullptr} {}

  Status run() override {
    DS_ASSIGN(Json answer, run_tool(plugin_, request_));
    findings_ = std::move(answer["findings"]);
    return {};
  }
  CallOutput take_output() override { return {{}, {}, std::move(findings_)}; }

 private:
  const PluginInstance& plugin_;
  const ToolRequest request_;
  Json findings_ = Json::array();
};

double largest_of(const std::vector<float>& values) {
  double out = 0;
  for (const float v : values) out = std::max(out, std::abs(double(v)));
  return out;
}

void compare_values(const std::vector<float>& expected, const std::vector<float>& got,
                    Difference& out) {
  constexpr double kFar = std::numeric_limits<double>::infinity();
  if (expected.size() != got.size()) {
    out.largest = out.mean = kFar;
    return;
  }
  const double unit = std::max(largest_of(expected), 1e-30);
  double sum = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    double off = std::abs(double(got[i]) - double(expected[i])) / unit;
    if (!std::isfinite(off)) off = kFar;
    out.largest = std::max(out.largest, off);
    sum += off;
  }
  out.mean = got.empty() ? 0 : sum / static_cast<double>(got.size());
}

/// The promise of ds_qformat.rel_tol, on the weights that were given.
double weights_off(const LinearCall& call, const std::vector<float>& got) {
  constexpr double kFar = std::numeric_limits<double>::infinity();
  if (got.size() != call.w.size()) return kFar;
  const auto width = static_cast<size_t>(call.k);
  double worst = 0;
  for (size_t row = 0; row < static_cast<size_t>(call.n); ++row) {
    double largest = 1e-30;
    for (size_t i = row * width; i < (row + 1) * width; ++i)
      largest = std::max(largest, std::abs(double(call.w[i])));
    for (size_t i = row * width; i < (row + 1) * width; ++i) {
      const double off = std::abs(double(got[i]) - double(call.w[i])) / largest;
      worst = std::max(worst, std::isfinite(off) ? off : kFar);
    }
  }
  return worst;
}

Json without(const Json& findings, const Json& others) {
  Json out = Json::array();
  for (const Json& finding : findings) {
    if (std::find(others.begin(), others.end(), finding) == others.end()) out.push_back(finding);
  }
  return out;
}

}  // namespace

Result<std::unique_ptr<ReplayedCall>> ReplayedCall::make(const PluginInstance& instance,
                                                         const CallInput& input,
                                                         int64_t deadline_ns) {
  if (const auto* attention = std::get_if<AttentionCall>(&input.of)) {
    auto out = std::make_unique<ReplayedAttention>(instance, *attention);
    DS_TRY(out->set_up());
    return std::unique_ptr<ReplayedCall>(std::move(out));
  }
  if (const auto* linear = std::get_if<LinearCall>(&input.of)) {
    auto out = std::make_unique<ReplayedLinear>(instance, *linear);
    DS_TRY(out->set_up());
    return std::unique_ptr<ReplayedCall>(std::move(out));
  }
  return std::unique_ptr<ReplayedCall>(
      std::make_unique<ReplayedTool>(instance, std::get<ToolCall>(input.of), deadline_ns));
}

Result<CallOutput> replay(const PluginInstance& instance, const CallInput& input,
                          int64_t deadline_ns, double* promised) {
  DS_ASSIGN(const auto call, ReplayedCall::make(instance, input, deadline_ns));
  DS_TRY(call->run());
  if (promised != nullptr) *promised = call->promised();
  return call->take_output();
}

Difference difference(const CallInput& input, const CallOutput& expected, const CallOutput& got,
                      double promised) {
  // Two right attentions differ in the order of their sums, or round what they multiply to BF16.
  constexpr double kAttention = 5e-3;
  // Two right products differ in how they round x, and by what their weights differ.
  constexpr double kLinear = 2e-2;
  Difference out;
  compare_values(expected.values, got.values, out);
  if (std::holds_alternative<AttentionCall>(input.of)) out.allowed = kAttention;
  if (const auto* linear = std::get_if<LinearCall>(&input.of)) {
    out.allowed = kLinear + 2 * promised;
    out.weights = weights_off(*linear, got.weights);
    out.promised = promised * (1 + 1e-5) + 1e-7;
  }
  out.gone = without(expected.findings, got.findings);
  out.added = without(got.findings, expected.findings);
  return out;
}

}  // namespace ds
