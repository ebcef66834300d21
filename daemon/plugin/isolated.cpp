// SPDX-License-Identifier: Apache-2.0
#include "plugin/isolated.h"

#include <algorithm>
#include <cstring>

#include "plugin/abi.h"
#include "plugin/utf8.h"

namespace ds {
namespace {

constexpr size_t kLeastSaved = size_t{1} << 20;  // bytes of changes that are not worth a save
constexpr ds_code kLastCode = DS_E_INTERNAL;

std::string milliseconds(int64_t ns) { return std::to_string((ns + 999'999) / 1'000'000) + " ms"; }

}  // namespace

ds_code isolated_error(ds_status* st, ds_code code, std::string_view text, uint32_t flags) {
  if (st == nullptr) return code;
  *st = {};
  st->code = code;
  st->flags = flags;
  st->len = static_cast<uint32_t>(std::min(text.size(), sizeof st->text));
  std::memcpy(st->text, text.data(), st->len);
  return code;
}

std::string_view IsolatedInstance::cannot(const ds_component& component) {
  switch (component.kind) {
    case DS_KIND_TOOL:
    case DS_KIND_RETRIEVER:
    case DS_KIND_CURRICULUM:
    case DS_KIND_QUANTIZER:
      return (component.caps & DS_CAP_OUT_OF_PROCESS) != 0
                 ? std::string_view()
                 : "it does not say DS_CAP_OUT_OF_PROCESS";
    case DS_KIND_ENCODER:
      return "an encoder reads the model's tensors, which a helper process does not have";
    case DS_KIND_ATTENTION:
      return "attention reads the cache in place, in every layer of every token";
    default:
      return "a learner works on the weights and gradients in place";
  }
}

IsolatedInstance::IsolatedInstance(const IsolationOptions& options, HelperLaunch launch,
                                   const ds_component& component, std::string config, Log log)
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
                                                                   std::string config, Log log) {
  std::unique_ptr<IsolatedInstance> made(new IsolatedInstance(options, std::move(launch), component,
                                                              std::move(config), std::move(log)));
  ds_status st{};
  const std::lock_guard lock(made->calls_);
  DS_TRY(plugin_status(text_of(component.name), made->ensure_running(&st), st));
  return made;
}

std::string IsolatedInstance::request(HelperOp op, const ds_call* call, int64_t deadline_ns,
                                      std::string_view arguments) const {
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

ds_code IsolatedInstance::call(HelperOp op, const ds_call* call, const FlatWriter& arguments,
                               const Read& read, ds_status* st) {
  const std::lock_guard lock(calls_);
  if (const ds_code code = ensure_running(st); code != DS_OK) return code;
  const ds_code code = run(op, call, arguments.bytes(), read, st);
  if (process_ != nullptr) {
    const std::lock_guard known(known_);
    policy_.served();
  }
  return code;
}

ds_code IsolatedInstance::change(HelperOp op, const FlatWriter& arguments, const Read& read,
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
                              const Read& read, ds_status* st) {
  const ds_call c = full_struct(call);
  const int64_t deadline = c.deadline_ns != 0
                               ? c.deadline_ns
                               : system_clock_seam().monotonic_ns() + options_.call_timeout_ns;
  const std::string bytes = request(op, call, deadline, arguments);
  if (bytes.size() > process_->room())
    return isolated_error(st, DS_E_NOMEM,
                          "the call has " + std::to_string(bytes.size()) +
                              " bytes, its helper process takes at most " +
                              std::to_string(process_->room()));
  return exchange({bytes, deadline, c.cancel}, read, st);
}

ds_code IsolatedInstance::exchange(const Sent& sent, const Read& read, ds_status* st) {
  const HelperProcess::Answer answer = process_->exchange(
      sent.request, sent.deadline_ns + options_.grace_ns, sent.cancel, options_.grace_ns);
  if (answer.end != HelperProcess::End::kReply) return died(answer.end, answer.why, st);
  return judge(answer.bytes, read, st);
}

ds_code IsolatedInstance::judge(const std::string& reply, const Read& read, ds_status* st) {
  FlatReader from(reply);
  const auto code = from.get<ds_code>();
  const auto native = from.get<int32_t>();
  const auto flags = from.get<uint32_t>();
  const std::string_view text = from.get_text();
  if (code < DS_OK || code > kLastCode) from.fail("its code is none of the ABI's");
  if (text.size() > sizeof st->text || !valid_utf8(text)) from.fail("its text is broken");
  const uint64_t logs = from.get_count(sizeof(int32_t) + sizeof(uint64_t));
  if (logs > kMostHelperLogs) from.fail("it has too many log lines");
  for (uint64_t i = 0; i < logs && from.ok(); ++i) {
    const auto level = from.get<int32_t>();
    const std::string_view line = from.get_text();
    if (level < DS_LOG_TRACE || level > DS_LOG_ERROR || !valid_utf8(line))
      from.fail("a log line is broken");
    else if (from.ok() && log_)
      log_(level, line);
  }
  ds_code ours = code;
  if (from.ok() && code == DS_OK && read) ours = read(from);
  if (from.ok() && code == DS_OK && ours == DS_OK && !from.at_end())
    from.fail("something follows it");
  if (!from.ok())
    return died(HelperProcess::End::kGarbage, std::string("reply: ") + from.why(), st);
  if (code != DS_OK) {
    isolated_error(st, code, text, flags);
    if (st != nullptr) st->native = native;
  } else if (ours != DS_OK) {
    isolated_error(st, ours, "stopped by its caller");
  }
  return ours;
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
