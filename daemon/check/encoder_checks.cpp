// SPDX-License-Identifier: Apache-2.0
// Encoders: one operation per kind of media, and level 2: the task's weight, finite output,
// gradients against central differences.
#include <algorithm>
#include <cmath>
#include <random>

#include "check/check.h"

namespace ds::check {
namespace {

constexpr int64_t kVocabulary = 64, kModelWidth = 48;  // of the model tensors that it reads

struct Media {
  uint32_t modality = 0;
  ds_dtype dtype{};
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
  double rate = 0;
};

template <class T>
void fill(Media& m, int64_t n, const std::function<T()>& value) {
  m.bytes.resize(static_cast<size_t>(n) * sizeof(T));
  for (int64_t i = 0; i < n; ++i) {
    const T v = value();
    std::memcpy(m.bytes.data() + static_cast<size_t>(i) * sizeof(T), &v, sizeof v);
  }
}

Media media_of(uint32_t modality, int64_t scale, bool empty, uint64_t seed) {
  std::mt19937_64 rng(seed);
  Media m;
  m.modality = modality;
  const int64_t size = empty ? 0 : 24 * scale;
  switch (modality) {
    case DS_MOD_TEXT:
      m.dtype = kI32;
      m.shape = {size};
      fill<int32_t>(m, size, [&] { return static_cast<int32_t>(rng() % kVocabulary); });
      break;
    case DS_MOD_IMAGE:
      m.shape = {size, empty ? 0 : 40, 3};
      break;
    case DS_MOD_VIDEO:
      m.shape = {empty ? 0 : 4, size, 32, 3};
      break;
    default:
      m.dtype = kF32;
      m.shape = {size * 100, 1};
      m.rate = 16000;
      fill<float>(m, size * 100, [&] { return std::uniform_real_distribution<float>(-1, 1)(rng); });
  }
  if (modality == DS_MOD_IMAGE || modality == DS_MOD_VIDEO) {
    m.dtype = kU8;
    if (modality == DS_MOD_VIDEO) m.rate = 25;
    int64_t n = 1;
    for (const int64_t d : m.shape) n *= d;
    fill<uint8_t>(m, n, [&] { return static_cast<uint8_t>(rng()); });
  }
  return m;
}

struct Encoded {
  std::vector<float> out;
  std::vector<std::vector<float>> dtensors;
  int64_t tokens = 0, width = 0;
};

/// The model's tensors that it reads, as [vocabulary, model width] of FP32: the kit knows no other
/// shape.
using Tensors = std::vector<std::vector<float>>;
Tensors tensors_for(const ds_encoder& table, uint64_t seed) {
  std::mt19937_64 rng(seed);
  Tensors out(table.tensor_count,
              std::vector<float>(static_cast<size_t>(kVocabulary * kModelWidth)));
  for (auto& tensor : out) {
    for (float& x : tensor) x = std::uniform_real_distribution<float>(-1, 1)(rng);
  }
  return out;
}

/// plan, encode and, for `dout`, backward. `tensors` is filled when empty.
Encoded encode(Trial& t, const Media& m, float weight, const std::vector<float>* dout,
               Tensors* tensors) {
  const auto table = table_of<ds_encoder>(t.component);
  Encoded out;
  ds_media media{};
  media.modality = m.modality;
  media.data = t.tensor("media", m.dtype, m.shape, m.bytes.data());
  media.rate = m.rate;
  media.weight = weight;
  Tensors own;
  if (tensors == nullptr) tensors = &own;
  if (tensors->empty()) *tensors = tensors_for(table, t.options.content + 3);
  std::vector<const ds_tensor*> read, gradients;
  for (const auto& values : *tensors)
    read.push_back(
        t.tensor("model tensor", kF32, {kVocabulary, kModelWidth}, values.data(), false, false));
  ds_encode_args a{};
  a.tensors = read.data();
  a.flags = dout != nullptr ? DS_ENCODE_TRAIN : 0;
  a.media = t.give("ds_media", media);
  ds_plan* room = t.take<ds_plan>("ds_plan");
  const ds_encode_args* args = t.give("ds_encode_args", a);
  if (!t.invoke("plan", [&](ds_status* st) { return table.plan(t.instance, args, room, st); }))
    return out;
  const ds_plan plan = t.taken(room);
  if (t.room_was_cut()) return out;
  out.tokens = plan.shape[0];
  out.width = plan.shape[1];
  if (out.tokens < 0 || out.tokens > 1 << 20 || out.width <= 0 || out.width > 1 << 16) {
    if (out.tokens != 0)
      t.breaks("plan: output [" + std::to_string(out.tokens) + ", " + std::to_string(out.width) +
               "]");
    return out;
  }
  a.out = t.tensor("out", kF32, {out.tokens, out.width}, nullptr, true);
  a.saved = plan.saved_bytes != 0 ? t.memory(plan.saved_bytes) : nullptr;
  const ds_call* call = t.call(plan.workspace_bytes);
  args = t.give("ds_encode_args", a);
  if (!t.invoke("encode",
                [&](ds_status* st) { return table.encode(t.instance, call, args, st); }) ||
      a.out == nullptr)
    return out;
  t.add_output(a.out);
  out.out = floats_of(a.out);
  if (dout == nullptr || table.backward == nullptr) return out;
  std::vector<float> gradient = *dout;
  gradient.resize(out.out.size(), 0.5f);
  a.dout = t.of("dout", kF32, {out.tokens, out.width}, gradient);
  for (size_t i = 0; i < tensors->size(); ++i)
    gradients.push_back(
        t.tensor("dtensor", kF32, {kVocabulary, kModelWidth}, nullptr, true, false));
  a.dtensors = gradients.data();
  call = t.call(plan.workspace_bytes);
  args = t.give("ds_encode_args", a);
  if (!t.invoke("backward",
                [&](ds_status* st) { return table.backward(t.instance, call, args, st); }))
    return out;
  for (const ds_tensor* d : gradients) {
    if (d == nullptr) continue;
    t.add_output(d);
    out.dtensors.push_back(floats_of(d));
  }
  return out;
}

template <uint32_t kModality>
bool reads(const ds_component& c) {
  return (table_of<ds_encoder>(c).modalities & (1u << kModality)) != 0;
}
template <uint32_t kModality>
void encode_one(Trial& t) {
  const Media m = media_of(kModality, t.options.scale, t.options.empty, t.options.content);
  const std::vector<float> dout;
  encode(t, m, 1, &dout, nullptr);
}

std::vector<Media> offered_media(const Bench& bench) {
  std::vector<Media> out;
  for (const uint32_t m : {DS_MOD_TEXT, DS_MOD_IMAGE, DS_MOD_AUDIO, DS_MOD_VIDEO}) {
    if ((table_of<ds_encoder>(bench.component).modalities & (1u << m)) != 0)
      out.push_back(media_of(m, 1, false, bench.settings.seed));
  }
  return out;
}

std::vector<float> encoded(Bench& bench, const Media& m, float weight) {
  const Instance instance(bench);
  Trial trial(bench.component, instance.get(), {});
  return encode(trial, m, weight, nullptr, nullptr).out;
}

Verdict weight_scales(Bench& bench) {
  for (const Media& m : offered_media(bench)) {
    const std::vector<float> one = encoded(bench, m, 1), half = encoded(bench, m, 0.5f),
                             unset = encoded(bench, m, 0);
    if (one.empty() || half.size() != one.size() || unset.size() != one.size())
      return failed("encode failed");
    for (size_t i = 0; i < one.size(); ++i) {
      if (!std::isfinite(one[i])) return failed("element " + std::to_string(i) + " is not finite");
      if (std::abs(half[i] - 0.5f * one[i]) > 1e-5f * (1 + std::abs(one[i])) || unset[i] != one[i])
        return failed("element " + std::to_string(i) + " with weights 1, 0.5 and 0 (= 1) is " +
                      std::to_string(one[i]) + ", " + std::to_string(half[i]) + " and " +
                      std::to_string(unset[i]));
    }
  }
  return pass();
}

/// The host gives an encoder of text the ids of a step, whatever sequences they are of.
Verdict text_rows(Bench& bench) {
  if (!reads<DS_MOD_TEXT>(bench.component)) return skipped("does not read text");
  const Media all = media_of(DS_MOD_TEXT, 1, false, bench.settings.seed);
  const std::vector<float> together = encoded(bench, all, 1);
  const int64_t n = all.shape[0];
  if (together.empty() || together.size() % static_cast<size_t>(n) != 0)
    return failed(std::to_string(together.size()) + " values for " + std::to_string(n) +
                  " tokens, expected the same number for each");
  const size_t width = together.size() / static_cast<size_t>(n);
  for (size_t row = 0; row < static_cast<size_t>(n); ++row) {
    Media one = all;
    one.shape = {1};
    one.bytes.assign(all.bytes.begin() + static_cast<int64_t>(row * sizeof(int32_t)),
                     all.bytes.begin() + static_cast<int64_t>((row + 1) * sizeof(int32_t)));
    const std::vector<float> alone = encoded(bench, one, 1);
    if (alone.size() != width || !std::equal(alone.begin(), alone.end(), &together[row * width]))
      return failed("token " + std::to_string(row) + " of " + std::to_string(n) +
                    " has other values than alone");
  }
  return pass();
}

double loss_of(const std::vector<float>& out, const std::vector<float>& dout) {
  double sum = 0;
  for (size_t i = 0; i < out.size(); ++i) sum += double{out[i]} * dout[i];
  return sum;
}

/// Elements of the plugin's own parameters: gradient of sum(out * dout) by central differences.
Verdict parameter_gradients(Bench& bench, const Media& m, const std::vector<float>& dout) {
  const ds_instance_ops ops = ops_of(bench.component);
  if (ops.parameters == nullptr) return pass();
  const Instance instance(bench);
  const ds_parameter* const* all = nullptr;
  uint32_t n = 0;
  ds_status st{};
  if (ops.parameters(instance.get(), &all, &n, &st) != DS_OK) return failed("parameters failed");
  const auto run = [&](bool back) {
    Trial t(bench.component, instance.get(), {});
    return encode(t, m, 1, back ? &dout : nullptr, nullptr).out;
  };
  if (run(true).empty()) return failed("backward failed");
  std::mt19937_64 rng(bench.settings.seed);
  for (uint32_t p = 0; p < n; ++p) {
    auto* value = static_cast<float*>(all[p]->value->data);
    const auto* gradient = static_cast<const float*>(all[p]->gradient->data);
    const uint64_t count = all[p]->value->bytes / sizeof(float);
    for (int probe = 0; probe < 12 && count > 0; ++probe) {
      const uint64_t i = rng() % count;
      const float was = value[i], h = 1e-2f;
      const auto moved = [&](float to) {
        value[i] = to;
        if (ops.parameters_changed != nullptr) (void)ops.parameters_changed(instance.get(), &st);
        return loss_of(run(false), dout);
      };
      const double want = (moved(was + h) - moved(was - h)) / ((was + h) - (was - h));
      (void)moved(was);
      if (!(std::abs(want - gradient[i]) <= 2e-3 + 1e-2 * std::abs(want)))
        return failed(std::string(text_of(all[p]->name)) + "[" + std::to_string(i) +
                      "]: gradient " + std::to_string(gradient[i]) + ", central differences give " +
                      std::to_string(want));
    }
  }
  return pass();
}

Verdict tensor_gradients(Bench& bench, const Media& m, const std::vector<float>& dout) {
  Tensors tensors;
  const auto run = [&](Tensors& with, bool back) {
    const Instance instance(bench);
    Trial t(bench.component, instance.get(), {});
    return encode(t, m, 1, back ? &dout : nullptr, &with);
  };
  const Encoded at = run(tensors, true);
  std::mt19937_64 rng(bench.settings.seed);
  for (size_t k = 0; k < at.dtensors.size(); ++k) {
    for (int probe = 0; probe < 24; ++probe) {
      const size_t i = rng() % at.dtensors[k].size();
      const auto moved = [&](float by) {
        Tensors with = tensors;
        with[k][i] += by;
        return loss_of(run(with, false).out, dout);
      };
      const double want = (moved(1e-2f) - moved(-1e-2f)) / 2e-2;
      if (!(std::abs(want - at.dtensors[k][i]) <= 2e-3 + 1e-2 * std::abs(want)))
        return failed("model tensor " + std::to_string(k) + "[" + std::to_string(i) +
                      "]: gradient " + std::to_string(at.dtensors[k][i]) +
                      ", central differences give " + std::to_string(want));
    }
  }
  return pass();
}

Verdict encoder_gradients(Bench& bench) {
  if (table_of<ds_encoder>(bench.component).backward == nullptr) return skipped("no backward");
  for (const Media& m : offered_media(bench)) {
    std::vector<float> dout(encoded(bench, m, 1).size());
    std::mt19937_64 rng(bench.settings.seed + 2);
    for (float& x : dout) x = std::uniform_real_distribution<float>(-1, 1)(rng);
    for (const Verdict& v :
         {parameter_gradients(bench, m, dout), tensor_gradients(bench, m, dout)}) {
      if (v.result == Outcome::kFail) return v;
    }
  }
  return pass();
}

}  // namespace

std::vector<Operation> encoder_operations() {
  return {{"text", reads<DS_MOD_TEXT>, encode_one<DS_MOD_TEXT>},
          {"image", reads<DS_MOD_IMAGE>, encode_one<DS_MOD_IMAGE>},
          {"audio", reads<DS_MOD_AUDIO>, encode_one<DS_MOD_AUDIO>},
          {"video", reads<DS_MOD_VIDEO>, encode_one<DS_MOD_VIDEO>}};
}

std::vector<Check> encoder_checks() {
  return {{"numerics.weight", 2, DS_KIND_ENCODER, {}, weight_scales},
          {"numerics.rows", 2, DS_KIND_ENCODER, {}, text_rows},
          {"numerics.gradient", 2, DS_KIND_ENCODER, {}, encoder_gradients}};
}

}  // namespace ds::check
