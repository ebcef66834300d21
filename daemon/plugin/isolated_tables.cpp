// SPDX-License-Identifier: Apache-2.0
// The functions of each kind that can run isolated: arguments to flat values, results back. What
// comes back is judged before anything else sees it.
#include <span>

#include "plugin/abi.h"
#include "plugin/isolated.h"
#include "plugin/plugin_config.h"
#include "plugin/tensor_wire.h"

namespace ds {
namespace {

IsolatedInstance& self(ds_instance* instance) {
  return *reinterpret_cast<IsolatedInstance*>(instance);
}

// --- All kinds ---

void destroy(ds_instance* instance) {
  const std::unique_ptr<IsolatedInstance> last(&self(instance));
}

ds_code health(ds_instance* instance, ds_status* st) { return self(instance).health(st); }

ds_code reconfigure(ds_instance* instance, const ds_config* config, ds_status* st) {
  return self(instance).reconfigure(text_of(config_json(config)), st);
}

ds_code save(ds_instance* instance, const ds_sink* sink, ds_status* st) {
  return self(instance).call(
      HelperOp::kSave, nullptr, {}, [&](FlatReader& from) { return read_sink(from, sink); }, st);
}

ds_code restore(ds_instance* instance, const ds_source* source, ds_str saved_by, ds_status* st) {
  std::string state;
  for (char part[65536];;) {
    uint64_t got = 0;
    if (const ds_code code = source->read(source->ctx, part, sizeof part, &got); code != DS_OK)
      return code;
    if (got == 0) break;
    state.append(part, static_cast<size_t>(got));
  }
  return self(instance).restore(std::move(state), text_of(saved_by), st);
}

ds_code stats(ds_instance* instance, const ds_sink* json, ds_status* st) {
  return self(instance).call(
      HelperOp::kStats, nullptr, {}, [&](FlatReader& from) { return read_text_sink(from, json); },
      st);
}

// --- Tool ---

ds_code analyse(ds_instance* instance, const ds_call* call, ds_str language, ds_str path,
                ds_str text, void* ctx, ds_code (*emit)(void*, const ds_finding*), ds_status* st) {
  FlatWriter to;
  for (const ds_str s : {language, path, text}) to.put_text(text_of(s));
  return self(instance).call(
      HelperOp::kAnalyse, call, to,
      [&](FlatReader& from) { return read_findings(from, ctx, emit); }, st);
}

ds_code invoke(ds_instance* instance, const ds_call* call, ds_str arguments, const ds_sink* result,
               ds_status* st) {
  FlatWriter to;
  to.put_text(text_of(arguments));
  return self(instance).call(
      HelperOp::kInvoke, call, to, [&](FlatReader& from) { return read_text_sink(from, result); },
      st);
}

// --- Retriever ---

ds_code put(ds_instance* instance, uint64_t id, ds_str text, const ds_tensor* embedding,
            ds_str meta, ds_status* st) {
  FlatWriter to;
  to.put(id);
  to.put_text(text_of(text));
  put_tensor(to, embedding, true);
  to.put_text(text_of(meta));
  return self(instance).change(HelperOp::kPut, to, {}, st);
}

ds_code erase(ds_instance* instance, const uint64_t* ids, uint64_t n, ds_status* st) {
  FlatWriter to;
  to.put(n);
  for (const uint64_t id : std::span(ids, n)) to.put(id);
  return self(instance).change(HelperOp::kErase, to, {}, st);
}

ds_code commit(ds_instance* instance, uint64_t* version, ds_status* st) {
  const auto read = [&](FlatReader& from) { return read_version(from, version); };
  return self(instance).change(HelperOp::kCommit, {}, read, st);
}

ds_code search(ds_instance* instance, const ds_call* call, ds_str text, const ds_tensor* embedding,
               ds_str filter, ds_hit* out, uint64_t max, uint64_t* n, ds_status* st) {
  FlatWriter to;
  to.put_text(text_of(text));
  put_tensor(to, embedding, true);
  to.put_text(text_of(filter));
  to.put(max);
  const auto read = [&](FlatReader& from) { return read_hits(from, out, max, n); };
  return self(instance).call(HelperOp::kSearch, call, to, read, st);
}

ds_code fetch(ds_instance* instance, uint64_t id, const ds_sink* text, const ds_sink* meta,
              ds_status* st) {
  FlatWriter to;
  to.put(id);
  const auto read = [&](FlatReader& from) {
    const ds_code code = read_text_sink(from, text);
    return code == DS_OK ? read_text_sink(from, meta) : code;
  };
  return self(instance).call(HelperOp::kFetch, nullptr, to, read, st);
}

// --- Curriculum ---

FlatWriter samples_of(const ds_sample* samples, uint64_t n) {
  FlatWriter to;
  to.put_text({reinterpret_cast<const char*>(samples), n * sizeof *samples});
  return to;
}

ds_code pick(ds_instance* instance, const ds_call* call, const ds_sample* samples, uint64_t n,
             uint64_t budget, uint64_t* keys, uint64_t* n_keys, ds_status* st) {
  FlatWriter to = samples_of(samples, n);
  to.put(budget);
  const auto read = [&](FlatReader& from) { return read_picks(from, budget, keys, n_keys); };
  return self(instance).call(HelperOp::kPick, call, to, read, st);
}

ds_code score(ds_instance* instance, const ds_call* call, const ds_sample* samples, uint64_t n,
              float* difficulty, ds_status* st) {
  const auto read = [&](FlatReader& from) { return read_difficulties(from, difficulty, n); };
  return self(instance).call(HelperOp::kScore, call, samples_of(samples, n), read, st);
}

ds_code outcome(ds_instance* instance, const ds_sample* samples, uint64_t n, ds_status* st) {
  return self(instance).change(HelperOp::kOutcome, samples_of(samples, n), {}, st);
}

// --- Quantizer: not its linear, so the daemon serves what dequantize gives ---

ds_code format(ds_instance* instance, int64_t n, int64_t k, ds_qformat* out, ds_status* st) {
  FlatWriter to;
  to.put(n);
  to.put(k);
  const auto read = [&](FlatReader& from) { return read_format(from, out); };
  return self(instance).call(HelperOp::kFormat, nullptr, to, read, st);
}

ds_code observe(ds_instance* instance, const ds_call*, ds_str name, const ds_tensor* x,
                ds_status* st) {
  FlatWriter to;
  to.put_text(text_of(name));
  put_tensor(to, x, true);
  return self(instance).change(HelperOp::kObserve, to, {}, st);
}

void put_weight(FlatWriter& to, const ds_qweight& w, bool data) {
  to.put(w.n);
  to.put(w.k);
  const ds_qformat f = full_struct(w.format);
  to.put_text({reinterpret_cast<const char*>(&f), sizeof f});
  to.put<uint8_t>(data);
  if (!data) return;
  to.put_text({static_cast<const char*>(w.packed), f.packed_bytes});
  to.put_text({static_cast<const char*>(w.scales), f.scale_bytes});
  to.put_text({static_cast<const char*>(w.zeros), f.zero_bytes});
}

ds_code quantize(ds_instance* instance, const ds_call* call, ds_str name, const ds_tensor* w,
                 const ds_qweight* out, ds_status* st) {
  FlatWriter to;
  const ds_qweight weight = full_struct(out);
  to.put_text(text_of(name));
  put_tensor(to, w, true);
  put_weight(to, weight, false);
  const auto read = [&](FlatReader& from) { return read_weight(from, weight); };
  return self(instance).call(HelperOp::kQuantize, call, to, read, st);
}

ds_code dequantize(ds_instance* instance, const ds_call* call, const ds_qweight* weight,
                   const ds_tensor* w, ds_status* st) {
  FlatWriter to;
  put_weight(to, full_struct(weight), true);
  put_tensor(to, w, false);
  const auto read = [&](FlatReader& from) {
    return read_finite(from, *w, "a weight is NaN or infinity");
  };
  return self(instance).call(HelperOp::kDequantize, call, to, read, st);
}

// --- Encoder: not its backward, which would need its parameters here ---

/// Whether the media can be sent; without `data` only its shape is.
ds_code put_media(FlatWriter& to, const ds_encode_args& a, bool data, ds_status* st) {
  if (a.media == nullptr) return isolated_error(st, DS_E_ARG, "media: missing");
  if ((a.flags & DS_ENCODE_TRAIN) != 0)
    return isolated_error(st, DS_E_UNSUPPORTED, "does not train in a helper process");
  const ds_media media = full_struct(a.media);
  if (media.data != nullptr && media.data->ndim > kMostDims)
    return isolated_error(st, DS_E_SHAPE,
                          "media: " + std::to_string(media.data->ndim) + " dimensions, at most " +
                              std::to_string(kMostDims) + " in a helper process");
  if (data && media.data != nullptr && media.data->data == nullptr && media.data->bytes != 0)
    return isolated_error(st, DS_E_ARG, "media: no data");
  to.put(media.modality);
  put_tensor(to, media.data, data);
  to.put(media.rate);
  to.put(media.start_s);
  to.put(media.weight);
  to.put(media.flags);
  return DS_OK;
}

ds_code plan(ds_instance* instance, const ds_encode_args* args, ds_plan* out, ds_status* st) {
  FlatWriter to;
  if (const ds_code code = put_media(to, full_struct(args), false, st); code != DS_OK) return code;
  const uint64_t room = self(instance).room();
  const auto read = [&](FlatReader& from) { return read_encoder_plan(from, room, out); };
  return self(instance).call(HelperOp::kPlan, nullptr, to, read, st);
}

ds_code encode(ds_instance* instance, const ds_call* call, const ds_encode_args* args,
               ds_status* st) {
  FlatWriter to;
  const ds_encode_args a = full_struct(args);
  if (const ds_code code = put_media(to, a, true, st); code != DS_OK) return code;
  const ds_tensor* out = a.out;
  if (out == nullptr || out->data == nullptr || out->ndim != 2 || out->byte_offset != 0 ||
      out->dtype.code != DS_FLOAT || out->dtype.bits != 32 || out->shape[0] < 0 ||
      out->shape[1] <= 0 ||
      out->bytes / sizeof(float) / static_cast<uint64_t>(out->shape[1]) !=
          static_cast<uint64_t>(out->shape[0]))
    return isolated_error(st, DS_E_SHAPE, "out: expected FP32 [tokens, width] and nothing else");
  put_tensor(to, out, false);
  const auto read = [&](FlatReader& from) {
    return read_finite(from, *out, "a value of the output is NaN or infinity");
  };
  return self(instance).call(HelperOp::kEncode, call, to, read, st);
}

/// `ours` if the component has the function at all.
template <class F>
F if_there(F theirs, F ours) {
  return theirs != nullptr ? ours : nullptr;
}

}  // namespace

ds_component IsolatedInstance::proxied(const ds_component& component, IsolatedTable& t) {
  ds_component out = component;
  const ds_instance_ops ops = full_struct(component.ops);
  t.ops.size = sizeof t.ops;
  t.ops.destroy = &destroy;
  t.ops.health = &ds::health;
  t.ops.reconfigure = if_there(ops.reconfigure, &ds::reconfigure);
  t.ops.save = if_there(ops.save, &save);
  t.ops.restore = if_there(ops.restore, &ds::restore);
  t.ops.stats = if_there(ops.stats, &stats);
  out.ops = &t.ops;
  out.get_interface = nullptr;
  if (component.kind == DS_KIND_TOOL) {
    const auto theirs = full_struct(static_cast<const ds_tool*>(component.table));
    t.tool = {sizeof t.tool, 0, theirs.input_schema, if_there(theirs.analyse, &analyse),
              if_there(theirs.invoke, &invoke)};
    out.table = &t.tool;
  } else if (component.kind == DS_KIND_RETRIEVER) {
    t.retriever = {sizeof t.retriever, 0, &put, &erase, &commit, &search, &fetch};
    out.table = &t.retriever;
  } else if (component.kind == DS_KIND_CURRICULUM) {
    const auto theirs = full_struct(static_cast<const ds_curriculum*>(component.table));
    t.curriculum = {sizeof t.curriculum, 0, &pick, if_there(theirs.score, &score),
                    if_there(theirs.outcome, &outcome)};
    out.table = &t.curriculum;
  } else if (component.kind == DS_KIND_ENCODER) {
    const auto theirs = full_struct(static_cast<const ds_encoder*>(component.table));
    t.encoder.size = sizeof t.encoder;
    t.encoder.modalities = theirs.modalities;
    t.encoder.plan = &plan;
    t.encoder.encode = &encode;
    out.table = &t.encoder;
  } else {
    const auto theirs = full_struct(static_cast<const ds_quantizer*>(component.table));
    t.quantizer.size = sizeof t.quantizer;
    t.quantizer.format = &format;
    t.quantizer.observe = if_there(theirs.observe, &observe);
    t.quantizer.quantize = &quantize;
    t.quantizer.dequantize = &dequantize;
    out.table = &t.quantizer;
  }
  return out;
}

}  // namespace ds
