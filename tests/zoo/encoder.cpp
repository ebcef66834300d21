// SPDX-License-Identifier: Apache-2.0
// Encoders that break one rule each: a token for each 100 samples of sound, or for each id.
#include "tests/zoo/zoo.h"

namespace {

enum fault { sound, ignores_weight, wrong_gradient };
constexpr std::string_view names[] = {"sound", "ignores_weight", "wrong_gradient"};

template <fault F>
struct encoder {
  static constexpr std::string_view name = names[F];
  static constexpr std::uint32_t modalities = 1u << DS_MOD_AUDIO;
  static constexpr std::int64_t width = 4, piece = 100;
  explicit encoder(ds::sdk::context) : weight("weight", {width}), all{weight.parameter()} {
    for (std::int64_t i = 0; i < width; ++i) weight.value()[i] = 0.5f - 0.3f * float(i);
  }
  std::span<const ds_parameter* const> parameters() const { return all; }

  ds_plan plan(const ds_encode_args& a) const {
    ds_plan p{};
    p.shape[0] = static_cast<std::int64_t>(samples(a).size()) / piece;
    p.shape[1] = width;
    return p;
  }
  void encode(const ds_call&, const ds_encode_args& a) const {
    const auto in = samples(a);
    const std::int64_t tokens = static_cast<std::int64_t>(in.size()) / piece;
    const auto out = ds::sdk::flat<float>(a.out, "out", {tokens, width});
    const float w = F == ignores_weight ? 1.0f : weight_of(a);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t i = 0; i < width; ++i)
        out[t * width + i] = w * weight.value()[i] * mean(in, t);
  }
  void backward(const ds_call&, const ds_encode_args& a) {
    const auto in = samples(a);
    const std::int64_t tokens = static_cast<std::int64_t>(in.size()) / piece;
    const auto dout = ds::sdk::flat<const float>(a.dout, "dout", {tokens, width});
    const float w = weight_of(a) * (F == wrong_gradient ? 2.0f : 1.0f);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t i = 0; i < width; ++i)
        weight.gradient()[i] += w * dout[t * width + i] * mean(in, t);
  }

 private:
  static float weight_of(const ds_encode_args& a) {
    const float given = ds::sdk::widened(a.media).weight;
    return given != 0 ? given : 1;
  }
  static std::span<const float> samples(const ds_encode_args& a) {
    const ds_media m = ds::sdk::widened(a.media);
    if (m.modality != DS_MOD_AUDIO) throw ds::sdk::error(DS_E_UNSUPPORTED, "modality");
    return ds::sdk::flat<const float>(m.data, "sound", {-1, 1});
  }
  static float mean(std::span<const float> in, std::int64_t token) {
    float sum = 0;
    for (std::int64_t i = 0; i < piece; ++i) sum += in[token * piece + i];
    return sum / 10;
  }

  ds::sdk::trainable weight;
  std::array<const ds_parameter*, 1> all;
};

/// A token's values take up those of the token before it.
struct row_dependent {
  static constexpr std::string_view name = "row_dependent";
  static constexpr std::uint32_t modalities = 1u << DS_MOD_TEXT;
  static constexpr std::int64_t width = 4;
  explicit row_dependent(ds::sdk::context) {}

  ds_plan plan(const ds_encode_args& a) const {
    ds_plan p{};
    p.shape[0] = std::ssize(ids(a));
    p.shape[1] = width;
    return p;
  }
  void encode(const ds_call&, const ds_encode_args& a) const {
    const auto in = ids(a);
    const auto out = ds::sdk::flat<float>(a.out, "out", {std::ssize(in), width});
    const float given = ds::sdk::widened(a.media).weight, w = given != 0 ? given : 1;
    std::int32_t before = 0;
    for (std::size_t t = 0; t < in.size(); before = in[t++])
      for (std::size_t i = 0; i < width; ++i)
        out[t * width + i] =
            w * (static_cast<float>(in[t] % 64) + 0.001f * static_cast<float>(before % 64));
  }

 private:
  static std::span<const std::int32_t> ids(const ds_encode_args& a) {
    if (a.media == nullptr) throw ds::sdk::error(DS_E_ARG, "media: missing");
    const ds_media m = ds::sdk::widened(a.media);
    if (m.modality != DS_MOD_TEXT) throw ds::sdk::error(DS_E_UNSUPPORTED, "modality");
    return ds::sdk::flat<const std::int32_t>(m.data, "ids", {-1});
  }
};

}  // namespace

DS_PLUGIN("org.driftstone.zoo.encoder", "1.0.0", "Apache-2.0", encoder<sound>,
          encoder<ignores_weight>, encoder<wrong_gradient>, row_dependent)
