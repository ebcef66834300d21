// SPDX-License-Identifier: Apache-2.0
#include "check/check.h"

#include "check/child.h"

namespace ds::check {

Instance::Instance(Bench& bench, std::unique_ptr<HostTable> host)
    : bench_(bench), host_(std::move(host)) {
  ds_status st{};
  ds_instance* out = nullptr;
  now_doing("create");
  code_ = bench.component.create(host_->table(), bench.config.get(), {DS_DEV_CPU, 0}, &out, &st);
  text_.assign(st.text, std::min<size_t>(st.len, sizeof st.text));
  if (code_ == DS_OK) instance_ = out;
  if (code_ == DS_OK && out == nullptr) {
    code_ = DS_E_INTERNAL;
    text_ = "create returned 0 without an instance";
  }
}

Instance::~Instance() {
  if (instance_ == nullptr) return;
  now_doing("destroy");
  ops_of(bench_.component).destroy(instance_);
}

Trace trace_on(Bench& bench, ds_instance* instance, const Operation& operation,
               const TrialOptions& options) {
  Trial trial(bench.component, instance, options);
  operation.run(trial);
  Trace out;
  out.code = trial.code;
  out.call = trial.last_call;
  out.text = std::move(trial.text);
  out.bad_status = std::move(trial.bad_status);
  out.broken = std::move(trial.broken);
  out.output = std::move(trial.output);
  out.intact = trial.intact();
  out.allocations = trial.allocations;
  out.refused = trial.refused;
  out.structs = std::move(trial.structs);
  out.outputs = std::move(trial.outputs);
  out.tensors = std::move(trial.tensors);
  return out;
}

Trace trace_of(Bench& bench, const Operation& operation, const TrialOptions& options) {
  const Instance instance(bench);
  if (!instance) {
    Trace out;
    out.code = instance.code();
    out.call = "create";
    out.text = instance.text();
    return out;
  }
  return trace_on(bench, instance.get(), operation, options);
}

std::string outcome_text(const Trace& trace) {
  return trace.call + " gave " + std::to_string(trace.code) +
         (trace.text.empty() ? "" : ": " + trace.text);
}

std::vector<Operation> operations_of(const ds_component& component) {
  std::vector<Operation> all, offered;
  switch (component.kind) {
    case DS_KIND_ATTENTION:
      all = attention_operations();
      break;
    case DS_KIND_ENCODER:
      all = encoder_operations();
      break;
    case DS_KIND_QUANTIZER:
      all = quantizer_operations();
      break;
    case DS_KIND_LEARNER:
      all = learner_operations();
      break;
    case DS_KIND_CURRICULUM:
      all = curriculum_operations();
      break;
    case DS_KIND_RETRIEVER:
      all = retriever_operations();
      break;
    case DS_KIND_TOOL:
      all = tool_operations();
      break;
    default:
      break;
  }
  for (const Operation& operation : all) {
    if (operation.offered(component)) offered.push_back(operation);
  }
  return offered;
}

}  // namespace ds::check
