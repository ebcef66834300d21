// SPDX-License-Identifier: Apache-2.0
#include "plugin/isolated_calls.h"

#include <memory>

#include "kernels/buffer.h"
#include "kernels/pool.h"
#include "plugin/abi.h"
#include "plugin/isolated.h"
#include "plugin/tensor_wire.h"

namespace ds {
namespace {

ds_code append(void* ctx, const void* bytes, uint64_t n) {
  static_cast<std::string*>(ctx)->append(static_cast<const char*>(bytes), n);
  return DS_OK;
}
ds_sink sink_to(std::string& out) { return {sizeof(ds_sink), 0, &out, &append}; }

ds_code missing(ds_status* st) {
  return isolated_error(st, DS_E_UNSUPPORTED, "has no such function");
}

/// The message without the name at its front, which the daemon puts there.
std::string own_words(const Status& status, const std::string& name) {
  const std::string& message = status.message();
  return message.starts_with(name + ": ") ? message.substr(name.size() + 2) : message;
}

/// A quantized weight with its own memory.
struct HeldWeight {
  explicit HeldWeight(FlatReader& from) {
    view.size = sizeof view;
    view.n = from.get<int64_t>();
    view.k = from.get<int64_t>();
    const std::string_view bytes = from.get_text();
    if (bytes.size() == sizeof format) std::memcpy(&format, bytes.data(), sizeof format);
    view.format = &format;
    const bool data = from.get<uint8_t>() != 0;
    for (const uint64_t n : {format.packed_bytes, format.scale_bytes, format.zero_bytes}) {
      parts.emplace_back(n);
      const std::string_view part = data ? from.get_text() : std::string_view();
      if (!part.empty() && part.size() <= n) std::memcpy(parts.back().data(), part.data(), part.size());
    }
    view.packed = parts[0].data(), view.scales = parts[1].data(), view.zeros = parts[2].data();
  }
  ds_qformat format{};
  ds_qweight view{};
  std::vector<Buffer> parts;
};

struct HeldMedia {
  explicit HeldMedia(FlatReader& from) : modality(from.get<uint32_t>()), data(from) {
    view.size = sizeof view;
    view.modality = modality;
    view.data = data.get();
    view.rate = from.get<double>();
    view.start_s = from.get<double>();
    view.weight = from.get<float>();
    view.flags = from.get<uint32_t>();
  }
  const uint32_t modality;
  const HeldTensor data;
  ds_media view{};
};

ds_code keep_finding(void* ctx, const ds_finding* given) {
  auto& [count, out] = *static_cast<std::pair<uint64_t, FlatWriter>*>(ctx);
  if (given == nullptr) return DS_E_ARG;
  const ds_finding f = full_struct(given);
  for (const uint32_t n : {f.severity, f.line, f.column, f.end_line, f.end_column}) out.put(n);
  for (const ds_str text : {f.rule, f.message, f.fix}) out.put_text(text_of(text));
  out.put(f.confidence);
  ++count;
  return DS_OK;
}

std::vector<ds_sample> samples_of(FlatReader& from) {
  const std::string_view bytes = from.get_text();
  std::vector<ds_sample> out(bytes.size() / sizeof(ds_sample));
  if (!out.empty()) std::memcpy(out.data(), bytes.data(), out.size() * sizeof(ds_sample));
  return out;
}

}  // namespace

HelperCalls::HelperCalls(uint32_t kind, std::string component, FileContent file,
                         const uint32_t* stop, uint64_t room)
    : kind_(kind),
      component_(std::move(component)),
      file_(std::move(file)),
      stop_(stop),
      room_(room) {
  services_.log = [this](int32_t level, std::string_view who, std::string_view text) {
    const std::lock_guard lock(lines_mutex_);
    if (lines_.size() < kMostHelperLogs)
      lines_.push_back({level, std::string(who), std::string(text)});
  };
}

std::string HelperCalls::answer(std::string_view request) {
  FlatReader from(request);
  const auto op = static_cast<HelperOp>(from.get<uint32_t>());
  ds_call call = host_call(serial_parallel());
  call.cancel = stop_;
  call.deadline_ns = from.get<int64_t>();
  call.seed = from.get<uint64_t>();
  call.step = from.get<uint64_t>();
  call.request_id = from.get<uint64_t>();
  call.generation = from.get<uint64_t>();
  call.workspace_bytes = from.get<uint64_t>();
  const Buffer workspace(call.workspace_bytes);
  call.workspace = workspace.data();
  ds_status st{};
  FlatWriter results;
  ds_code code = run(op, from, call, results, &st);
  if (code == DS_OK && !from.ok()) code = isolated_error(&st, DS_E_ARG, from.why());
  std::vector<Line> lines;
  {
    const std::lock_guard lock(lines_mutex_);
    lines.swap(lines_);
  }
  constexpr uint64_t kHeadRoom = 4096;
  if (results.bytes().size() > room_ - kHeadRoom)
    code = isolated_error(&st, DS_E_NOMEM,
                          "its answer has " + std::to_string(results.bytes().size()) +
                              " bytes, at most " + std::to_string(room_ - kHeadRoom));
  FlatWriter out;
  out.put(code);
  out.put(st.native);
  out.put(st.flags);
  out.put_text({st.text, std::min<size_t>(st.len, sizeof st.text)});
  size_t log_bytes = 0;
  for (const Line& line : lines) log_bytes += line.text.size() + 16;
  if (log_bytes > kHeadRoom / 2) lines.clear();
  out.put<uint64_t>(lines.size());
  for (const Line& line : lines) {
    out.put(line.level);
    out.put_text(line.text);
  }
  return code == DS_OK ? out.bytes() + results.bytes() : out.bytes();
}

ds_code HelperCalls::run(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                         ds_status* st) {
  if (op == HelperOp::kCreate) return create(from, st);
  if (op == HelperOp::kDescribe) return describe(out, st);
  if (instance_ == nullptr) return isolated_error(st, DS_E_STATE, "was not created");
  if (op <= HelperOp::kStats) return common(op, from, out, st);
  switch (kind_) {
    case DS_KIND_TOOL:
      return tool(op, from, call, out, st);
    case DS_KIND_RETRIEVER:
      return retriever(op, from, call, out, st);
    case DS_KIND_CURRICULUM:
      return curriculum(op, from, call, out, st);
    case DS_KIND_QUANTIZER:
      return quantizer(op, from, call, out, st);
    case DS_KIND_ENCODER:
      return encoder(op, from, call, out, st);
    default:
      return missing(st);
  }
}

ds_code HelperCalls::create(FlatReader& from, ds_status* st) {
  const auto made = [&]() -> Status {
    DS_ASSIGN(const Json config, parse_json(from.get_text()));
    DS_ASSIGN(const auto library, PluginLibrary::load(file_, services_));
    const ds_component* component = library->component(kind_, component_);
    if (component == nullptr) return not_found(file_.path + ": has no " + component_);
    DS_ASSIGN(instance_, PluginInstance::create(library, *component, config));
    return {};
  }();
  return made.ok() ? DS_OK : isolated_error(st, DS_E_CONFIG, own_words(made, component_));
}

ds_code HelperCalls::describe(FlatWriter& out, ds_status* st) {
  const auto library = PluginLibrary::load(file_, services_);
  if (!library.ok())
    return isolated_error(st, DS_E_INTERNAL, own_words(library.status(), file_.path));
  FlatWriter description;
  put_description(description, (*library)->said());
  out.put_text(description.bytes());
  return DS_OK;
}

ds_code HelperCalls::common(HelperOp op, FlatReader& from, FlatWriter& out, ds_status* st) {
  Status done;
  if (op == HelperOp::kHealth) done = instance_->health();
  if (op == HelperOp::kReconfigure) {
    Result<Json> config = parse_json(from.get_text());
    done = config.ok() ? instance_->reconfigure(*config) : config.status();
  }
  if (op == HelperOp::kSave) {
    Result<std::string> state = instance_->save();
    done = state.status();
    if (state.ok()) out.put_text(*state);
  }
  if (op == HelperOp::kRestore) {
    const std::string state(from.get_text());
    done = instance_->restore(state, from.get_text());
  }
  if (op == HelperOp::kStats) {
    const ds_instance_ops ops = full_struct(instance_->component().ops);
    if (ops.stats == nullptr) return missing(st);
    std::string json;
    const ds_sink sink = sink_to(json);
    const ds_code code = ops.stats(instance_->handle(), &sink, st);
    out.put_text(json);
    return code;
  }
  return done.ok() ? DS_OK : isolated_error(st, DS_E_STATE, own_words(done, component_));
}

ds_code HelperCalls::tool(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                          ds_status* st) {
  const auto table = instance_->table<ds_tool>();
  if (op == HelperOp::kAnalyse && table.analyse != nullptr) {
    const ds_str language = abi_str(from.get_text()), path = abi_str(from.get_text()),
                 text = abi_str(from.get_text());
    std::pair<uint64_t, FlatWriter> found;
    const ds_code code =
        table.analyse(instance_->handle(), &call, language, path, text, &found, &keep_finding, st);
    out.put(found.first);
    out.put_raw(found.second.bytes());
    return code;
  }
  if (op == HelperOp::kInvoke && table.invoke != nullptr) {
    std::string json;
    const ds_sink sink = sink_to(json);
    const ds_str arguments = abi_str(from.get_text());
    const ds_code code = table.invoke(instance_->handle(), &call, arguments, &sink, st);
    out.put_text(json);
    return code;
  }
  return missing(st);
}

ds_code HelperCalls::retriever(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                               ds_status* st) {
  const auto table = instance_->table<ds_retriever>();
  ds_instance* const handle = instance_->handle();
  if (op == HelperOp::kPut) {
    const auto id = from.get<uint64_t>();
    const ds_str text = abi_str(from.get_text());
    const HeldTensor embedding(from);
    return table.put(handle, id, text, embedding.get(), abi_str(from.get_text()), st);
  }
  if (op == HelperOp::kErase) {
    std::vector<uint64_t> ids(from.get_count(sizeof(uint64_t)));
    for (uint64_t& id : ids) id = from.get<uint64_t>();
    return table.erase(handle, ids.data(), ids.size(), st);
  }
  if (op == HelperOp::kCommit) {
    uint64_t version = 0;
    const ds_code code = table.commit(handle, &version, st);
    out.put(version);
    return code;
  }
  if (op == HelperOp::kSearch) {
    const ds_str text = abi_str(from.get_text());
    const HeldTensor embedding(from);
    const ds_str filter = abi_str(from.get_text());
    std::vector<ds_hit> hits(std::min(from.get<uint64_t>(), room_ / sizeof(ds_hit)));
    uint64_t n = 0;
    const ds_code code = table.search(handle, &call, text, embedding.get(), filter, hits.data(),
                                      hits.size(), &n, st);
    hits.resize(std::min<uint64_t>(n, hits.size()));
    out.put<uint64_t>(hits.size());
    for (const ds_hit& hit : hits) {
      out.put(hit.id);
      out.put(hit.score);
      out.put(hit.flags);
    }
    return code;
  }
  if (op == HelperOp::kFetch) {
    std::string text, meta;
    const ds_sink text_sink = sink_to(text), meta_sink = sink_to(meta);
    const ds_code code = table.fetch(handle, from.get<uint64_t>(), &text_sink, &meta_sink, st);
    out.put_text(text);
    out.put_text(meta);
    return code;
  }
  return missing(st);
}

ds_code HelperCalls::curriculum(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                                ds_status* st) {
  const auto table = instance_->table<ds_curriculum>();
  const std::vector<ds_sample> samples = samples_of(from);
  if (op == HelperOp::kPick) {
    const auto budget = from.get<uint64_t>();
    std::vector<uint64_t> keys(std::min<uint64_t>(budget, room_ / sizeof(uint64_t)));
    uint64_t n = 0;
    const ds_code code = table.pick(instance_->handle(), &call, samples.data(), samples.size(),
                                    keys.size(), keys.data(), &n, st);
    keys.resize(std::min<uint64_t>(n, keys.size()));
    out.put<uint64_t>(keys.size());
    for (const uint64_t key : keys) out.put(key);
    return code;
  }
  if (op == HelperOp::kScore && table.score != nullptr) {
    std::vector<float> difficulty(samples.size());
    const ds_code code = table.score(instance_->handle(), &call, samples.data(), samples.size(),
                                     difficulty.data(), st);
    for (const float d : difficulty) out.put(d);
    return code;
  }
  if (op == HelperOp::kOutcome && table.outcome != nullptr)
    return table.outcome(instance_->handle(), samples.data(), samples.size(), st);
  return missing(st);
}

ds_code HelperCalls::quantizer(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                               ds_status* st) {
  const auto table = instance_->table<ds_quantizer>();
  ds_instance* const handle = instance_->handle();
  if (op == HelperOp::kFormat) {
    const auto n = from.get<int64_t>(), k = from.get<int64_t>();
    ds_qformat format{};
    format.size = sizeof format;
    const ds_code code = table.format(handle, n, k, &format, st);
    const ds_qformat full = full_struct(&format);
    out.put_text({reinterpret_cast<const char*>(&full), sizeof full});
    return code;
  }
  if (op == HelperOp::kObserve && table.observe != nullptr) {
    const ds_str name = abi_str(from.get_text());
    const HeldTensor x(from);
    return table.observe(handle, &call, name, x.get(), st);
  }
  if (op == HelperOp::kQuantize) {
    const ds_str name = abi_str(from.get_text());
    const HeldTensor w(from);
    const HeldWeight weight(from);
    const ds_code code = table.quantize(handle, &call, name, w.get(), &weight.view, st);
    for (const Buffer& part : weight.parts) out.put_text({part.as<const char>(), part.bytes()});
    return code;
  }
  if (op == HelperOp::kDequantize) {
    const HeldWeight weight(from);
    const HeldTensor w(from);
    const ds_code code = table.dequantize(handle, &call, &weight.view, w.get(), st);
    out.put_text(w.bytes());
    return code;
  }
  return missing(st);
}

/// What plan asks for beside the output is this process's own affair.
ds_code HelperCalls::encoder(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                             ds_status* st) {
  const auto table = instance_->table<ds_encoder>();
  const HeldMedia media(from);
  if (!from.ok()) return isolated_error(st, DS_E_ARG, from.why());
  ds_encode_args args{};
  args.size = sizeof args;
  args.media = &media.view;
  ds_plan given{};
  given.size = sizeof given;
  if (const ds_code code = table.plan(instance_->handle(), &args, &given, st); code != DS_OK)
    return code;
  const ds_plan plan = full_struct(&given);
  if (op == HelperOp::kPlan) {
    out.put(plan.shape[0]);
    out.put(plan.shape[1]);
    return DS_OK;
  }
  if (op != HelperOp::kEncode) return missing(st);
  const HeldTensor to(from);
  if (!from.ok() || to.get() == nullptr) return isolated_error(st, DS_E_ARG, "out: missing");
  const int64_t* shape = to.get()->shape;
  if (shape[0] != plan.shape[0] || shape[1] != plan.shape[1])
    return isolated_error(st, DS_E_SHAPE,
                          "out: [" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) +
                              "], expected [" + std::to_string(plan.shape[0]) + ", " +
                              std::to_string(plan.shape[1]) + "]");
  const Buffer workspace(plan.workspace_bytes);
  ds_call own = call;
  own.workspace = workspace.data();
  own.workspace_bytes = plan.workspace_bytes;
  args.out = to.get();
  const ds_code code = table.encode(instance_->handle(), &own, &args, st);
  out.put_text(to.bytes());
  return code;
}

}  // namespace ds
