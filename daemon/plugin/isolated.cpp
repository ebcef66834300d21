// SPDX-License-Identifier: Apache-2.0
#include "plugin/isolated.h"

#include <algorithm>
#include <cstring>

#include "plugin/abi.h"

namespace ds {
namespace {

constexpr size_t kLeastSaved = size_t{1} << 20;  // bytes of changes that are not worth a save

std::string milliseconds(int64_t ns) { return std::to_string((ns + 999'999) / 1'000'000) + " ms"; }

}  // namespace

std::string_view IsolatedInstance::kind_cannot(uint32_t kind) {
  switch (kind) {
    case DS_KIND_TOOL:
    case DS_KIND_RETRIEVER:
    case DS_KIND_CURRICULUM:
    case DS_KIND_QUANTIZER:
    case DS_KIND_ENCODER:
      return {};
    case DS_KIND_ATTENTION:
      return "attention reads the cache in place, in every layer of every token";
    default:
      return "a learner works on the weights and gradients in place";
  }
}

std::string_view IsolatedInstance::cannot(const ds_component& component) {
  if (const std::string_view why = kind_cannot(component.kind); !why.empty()) return why;
  if (component.kind == DS_KIND_ENCODER &&
      full_struct(static_cast<const ds_encoder*>(component.table)).tensor_count != 0)
    return "it reads the model's tensors, which a helper process does not have";
  return (component.caps & DS_CAP_OUT_OF_PROCESS) != 0 ? std::string_view()
                                                       : "it does not say DS_CAP_OUT_OF_PROCESS";
}

IsolatedInstance::IsolatedInstance(const IsolationOptions& options, HelperLaunch launch,
                                   const ds_component& component, std::string config, HelperLog log)
    : options_(options),
      launch_(std::move(launch)),
      stateful_((component.caps & DS_CAP_STATEFUL) != 0),
      remembers_(stateful_ || component.kind == DS_KIND_RETRIEVER),
      log_(std::move(log)),
      config_(std::move(config)),
      policy_(options.restart) {}

Result<std::unique_ptr<IsolatedInstance>> IsolatedInstance::create(const IsolationOptions& options,
                                                                   HelperLaunch launch,
                                                                   const ds_component& component,
                                                                   std::string config,
                                                                   HelperLog log) {
  std::unique_ptr<IsolatedInstance> made(new IsolatedInstance(options, std::move(launch), component,
                                                              std::move(config), std::move(log)));
  ds_status st{};
  const std::lock_guard lock(made->calls_);
  DS_TRY(plugin_status(text_of(component.name), made->ensure_running(&st), st));
  return made;
}

std::string helper_request(HelperOp op, const ds_call* call, int64_t deadline_ns,
                           std::string_view arguments) {
  const ds_call c = full_struct(call);
  FlatWriter to;
  to.put(static_cast<uint32_t>(op));
  to.put(deadline_ns);
  to.put(c.seed);
  to.put(c.step);
  to.put(c.request_id);
  to.put(c.generation);
  to.put(c.workspace_bytes);
  return to.bytes() + std::string(arguments);
}

Result<std::string> describe_in_helper(const IsolationOptions& options, const HelperLaunch& launch,
                                       const std::string& id, const HelperLog& log) {
  DS_ASSIGN(const auto process, HelperProcess::start(launch));
  const int64_t deadline = system_clock_seam().monotonic_ns() + options.call_timeout_ns;
  const std::string request = helper_request(HelperOp::kDescribe, nullptr, deadline, {});
  const HelperProcess::Answer answer =
      process->exchange(request, deadline + options.grace_ns, nullptr, options.grace_ns);
  std::string out, why = answer.why;
  if (answer.end == HelperProcess::End::kReply) {
    ds_status st{};
    const auto read = [&](FlatReader& from) {
      out = from.get_text();
      return DS_OK;
    };
    const JudgedReply judged = judge_reply(answer.bytes, log, read, &st);
    if (judged.garbage.empty() && judged.code == DS_OK) return out;
    if (judged.garbage.empty()) return plugin_status("in a helper process", judged.code, st);
    why = judged.garbage;
  }
  if (options.on_death) options.on_death(id, why);
  switch (answer.end) {
    case HelperProcess::End::kReply:
    case HelperProcess::End::kGarbage:
      return Status(Code::kPlugin, "garbage from its helper process: " + why);
    case HelperProcess::End::kLate:
      return Status(Code::kDeadline, "its helper process did not load it within " +
                                         milliseconds(options.call_timeout_ns) + " and was killed");
    default:
      return Status(Code::kPlugin, "its helper process died while it loaded it (" + why + ")");
  }
}

ds_code IsolatedInstance::call(HelperOp op, const ds_call* call, const FlatWriter& arguments,
                               const ReplyReader& read, ds_status* st) {
  const std::lock_guard lock(calls_);
  if (const ds_code code = ensure_running(st); code != DS_OK) return code;
  const ds_code code = run(op, call, arguments.bytes(), read, st);
  if (process_ != nullptr) {
    const std::lock_guard known(known_);
    policy_.served();
  }
  return code;
}

ds_code IsolatedInstance::change(HelperOp op, const FlatWriter& arguments, const ReplyReader& read,
                                 ds_status* st) {
  const std::lock_guard lock(calls_);
  if (const ds_code code = ensure_running(st); code != DS_OK) return code;
  if (const ds_code code = run(op, nullptr, arguments.bytes(), read, st); code != DS_OK)
    return code;
  if (!remembers_) return DS_OK;
  changes_.emplace_back(op, arguments.bytes());
  changes_bytes_ += arguments.bytes().size();
  const bool waits_for_commit = op == HelperOp::kPut || op == HelperOp::kErase;
  if (stateful_ && !waits_for_commit && changes_bytes_ > std::max(kLeastSaved, state_.size()))
    compact();
  return DS_OK;
}

/// The state as it is now replaces the changes. When it cannot be saved the changes stay.
void IsolatedInstance::compact() {
  std::string saved;
  ds_status st{};
  const auto read = [&](FlatReader& from) {
    saved = from.get_text();
    return DS_OK;
  };
  if (run(HelperOp::kSave, nullptr, {}, read, &st) != DS_OK) return;
  state_ = std::move(saved);
  state_version_ = launch_.version;
  has_state_ = true;
  changes_.clear();
  changes_bytes_ = 0;
}

ds_code IsolatedInstance::run(HelperOp op, const ds_call* call, std::string_view arguments,
                              const ReplyReader& read, ds_status* st) {
  const ds_call c = full_struct(call);
  const int64_t deadline = c.deadline_ns != 0
                               ? c.deadline_ns
                               : system_clock_seam().monotonic_ns() + options_.call_timeout_ns;
  const std::string bytes = helper_request(op, call, deadline, arguments);
  if (bytes.size() > process_->room())
    return isolated_error(st, DS_E_NOMEM,
                          "the call has " + std::to_string(bytes.size()) +
                              " bytes, its helper process takes at most " +
                              std::to_string(process_->room()));
  return exchange({bytes, deadline, c.cancel}, read, st);
}

ds_code IsolatedInstance::exchange(const Sent& sent, const ReplyReader& read, ds_status* st) {
  const HelperProcess::Answer answer = process_->exchange(
      sent.request, sent.deadline_ns + options_.grace_ns, sent.cancel, options_.grace_ns);
  if (answer.end != HelperProcess::End::kReply) return died(answer.end, answer.why, st);
  const JudgedReply judged = judge_reply(answer.bytes, log_, read, st);
  if (!judged.garbage.empty()) return died(HelperProcess::End::kGarbage, judged.garbage, st);
  return judged.code;
}

ds_code IsolatedInstance::died(HelperProcess::End end, const std::string& why, ds_status* st) {
  process_.reset();
  {
    const std::lock_guard known(known_);
    policy_.died(options_.now());
    pid_ = -1;
    last_death_ = why;
  }
  if (options_.on_death) options_.on_death(launch_.kind + "/" + launch_.component, why);
  switch (end) {
    case HelperProcess::End::kLate:
      return isolated_error(st, DS_E_DEADLINE,
                            "no answer until " + milliseconds(options_.grace_ns) +
                                " after the deadline; its helper " + "process was killed");
    case HelperProcess::End::kCancelled:
      return isolated_error(st, DS_E_CANCELLED,
                            "did not stop when asked to; its helper process was killed");
    case HelperProcess::End::kGarbage:
      return isolated_error(st, DS_E_INTERNAL, "garbage from its helper process, killed: " + why);
    default:
      return isolated_error(st, DS_E_INTERNAL, "its helper process died in the call (" + why + ")",
                            DS_ST_RETRYABLE);
  }
}

ds_code IsolatedInstance::ensure_running(ds_status* st) {
  if (process_ != nullptr) return DS_OK;
  {
    const std::lock_guard known(known_);
    const int64_t now = options_.now(), wait = policy_.wait_ns(now);
    if (wait > 0)
      return isolated_error(st, DS_E_BUSY,
                            "its helper process died (" + last_death_ + ") and " +
                                (policy_.open(now) ? "did so too often" : "is about to start") +
                                "; next start in " + milliseconds(wait),
                            DS_ST_RETRYABLE);
  }
  auto started = HelperProcess::start(launch_);
  if (!started.ok()) {
    const std::lock_guard known(known_);
    policy_.died(options_.now());
    last_death_ = started.status().message();
    return isolated_error(st, DS_E_INTERNAL, last_death_);
  }
  process_ = std::move(*started);
  {
    const std::lock_guard known(known_);
    pid_ = process_->pid();
  }
  const ds_code code = replay(st);
  if (code != DS_OK && process_ != nullptr) {  // a helper without its instance is of no use
    process_.reset();
    const std::lock_guard known(known_);
    pid_ = -1;
    policy_.died(options_.now());
    last_death_ = "it could not be set up again";
  }
  return code;
}

ds_code IsolatedInstance::replay(ds_status* st) {
  FlatWriter config;
  config.put_text(config_);
  if (const ds_code code = run(HelperOp::kCreate, nullptr, config.bytes(), {}, st); code != DS_OK)
    return code;
  if (has_state_) {
    FlatWriter state;
    state.put_text(state_);
    state.put_text(state_version_);
    const ds_code code = run(HelperOp::kRestore, nullptr, state.bytes(), {}, st);
    if (code != DS_OK) return code;
  }
  const auto any = [](FlatReader& from) {
    while (!from.at_end()) from.get<uint8_t>();
    return DS_OK;
  };
  for (const auto& [op, arguments] : changes_) {
    if (const ds_code code = run(op, nullptr, arguments, any, st); code != DS_OK) return code;
  }
  return DS_OK;
}

ds_code IsolatedInstance::health(ds_status* st) {
  const std::unique_lock lock(calls_, std::try_to_lock);
  if (!lock.owns_lock()) return DS_OK;  // it is answering a call
  if (const ds_code code = ensure_running(st); code != DS_OK) return code;
  return run(HelperOp::kHealth, nullptr, {}, {}, st);
}

ds_code IsolatedInstance::reconfigure(std::string_view config, ds_status* st) {
  FlatWriter arguments;
  arguments.put_text(config);
  const std::lock_guard lock(calls_);
  if (const ds_code code = ensure_running(st); code != DS_OK) return code;
  const ds_code code = run(HelperOp::kReconfigure, nullptr, arguments.bytes(), {}, st);
  if (code == DS_OK) config_ = config;
  return code;
}

ds_code IsolatedInstance::restore(std::string state, std::string_view saved_by_version,
                                  ds_status* st) {
  FlatWriter arguments;
  arguments.put_text(state);
  arguments.put_text(saved_by_version);
  const std::lock_guard lock(calls_);
  if (const ds_code code = ensure_running(st); code != DS_OK) return code;
  const ds_code code = run(HelperOp::kRestore, nullptr, arguments.bytes(), {}, st);
  if (code != DS_OK) return code;
  state_ = std::move(state);
  state_version_ = saved_by_version;
  has_state_ = true;
  changes_.clear();
  changes_bytes_ = 0;
  return DS_OK;
}

IsolatedInstance::State IsolatedInstance::state() const {
  const std::lock_guard known(known_);
  const int64_t now = options_.now();
  return {pid_, policy_.deaths(), policy_.breaker(now), policy_.open(now)};
}

}  // namespace ds
