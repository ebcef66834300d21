// SPDX-License-Identifier: Apache-2.0
// Encoder: an image becomes one token per patch, a learned projection of the patch's mean colour.
#include "ds/plugin.hpp"

struct patch_mean {
  static constexpr std::string_view name = "patch-mean";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_OUT_OF_PROCESS;
  static constexpr std::string_view config_schema = R"({"type": "object", "properties": {
    "patch": {"type": "integer", "minimum": 1, "default": 16, "description": "pixels per side"},
    "width": {"type": "integer", "minimum": 1, "default": 576, "description": "of a token"}}})";
  static constexpr std::uint32_t modalities = 1u << DS_MOD_IMAGE;
  static constexpr std::int64_t channels = 3;

  explicit patch_mean(ds::sdk::context c)
      : patch(c.get("patch", 16)),
        width(c.get("width", 576)),
        weight("projection.weight", {width, channels}),
        all{weight.parameter()} {
    std::uint32_t bits = 1;  // any start that breaks the symmetry of the rows will do
    for (float& w : weight.value()) {
      bits = bits * 1664525u + 1013904223u;
      w = static_cast<float>(bits >> 8) / (1u << 24) - 0.5f;
    }
  }

  std::span<const ds_parameter* const> parameters() const { return all; }

  ds_plan plan(const ds_encode_args& a) const {
    const image in(a, patch);
    ds_plan p{};
    p.shape[0] = in.tokens();
    p.shape[1] = width;
    p.workspace_bytes = static_cast<std::uint64_t>(in.tokens() * channels) * sizeof(float);
    return p;
  }

  void encode(const ds_call& call, const ds_encode_args& a) const {
    const image in(a, patch);
    const auto out = ds::sdk::flat<float>(a.out, "out", {in.tokens(), width});
    const auto w = weight.value();
    ds::sdk::parallel_for(call, in.tokens(), [&](std::int64_t token) {
      const auto mean = in.mean(token);
      for (std::int64_t i = 0; i < width; ++i) {
        float sum = 0;
        for (std::int64_t c = 0; c < channels; ++c) sum += w[i * channels + c] * mean[c];
        out[token * width + i] = in.task_weight * sum;
      }
    });
  }

  void backward(const ds_call& call, const ds_encode_args& a) {
    const image in(a, patch);
    const auto dout = ds::sdk::flat<const float>(a.dout, "dout", {in.tokens(), width});
    const auto means = ds::sdk::workspace<float>(call, in.tokens() * channels);
    for (std::int64_t token = 0; token < in.tokens(); ++token)
      std::ranges::copy(in.mean(token), means.begin() + token * channels);
    const auto dw = weight.gradient();
    ds::sdk::parallel_for(call, width, [&](std::int64_t i) {
      for (std::int64_t token = 0; token < in.tokens(); ++token)
        for (std::int64_t c = 0; c < channels; ++c)
          dw[i * channels + c] +=
              in.task_weight * dout[token * width + i] * means[token * channels + c];
    });
  }

 private:
  struct image {
    std::span<const std::uint8_t> pixels;
    std::int64_t patch, height, width, columns;
    float task_weight;

    image(const ds_encode_args& a, std::int64_t patch_side) : patch(patch_side) {
      const ds_media m = ds::sdk::widened(a.media);
      if (m.modality != DS_MOD_IMAGE)
        throw ds::sdk::error(DS_E_UNSUPPORTED,
                             "modality " + std::to_string(m.modality) + ", expected an image (2)");
      pixels = ds::sdk::flat<const std::uint8_t>(m.data, "image", {-1, -1, channels});
      height = m.data->shape[0];
      width = m.data->shape[1];
      if (pixels.empty()) throw ds::sdk::error(DS_E_SHAPE, "image: no pixels");
      columns = (width + patch - 1) / patch;
      task_weight = m.weight == 0 ? 1 : m.weight;  // 0 = not set
    }
    std::int64_t tokens() const { return columns * ((height + patch - 1) / patch); }
    std::array<float, channels> mean(std::int64_t token) const {  // of each channel, 0..1
      const std::int64_t top = token / columns * patch, left = token % columns * patch;
      const std::int64_t bottom = std::min(height, top + patch);
      const std::int64_t right = std::min(width, left + patch);
      std::array<double, channels> sum{};
      for (std::int64_t y = top; y < bottom; ++y)
        for (std::int64_t x = left; x < right; ++x)
          for (std::int64_t c = 0; c < channels; ++c)
            sum[c] += pixels[(y * width + x) * channels + c];
      std::array<float, channels> out;
      for (std::int64_t c = 0; c < channels; ++c)
        out[c] = static_cast<float>(sum[c] /
                                    (255.0 * static_cast<double>((bottom - top) * (right - left))));
      return out;
    }
  };

  std::int64_t patch, width;
  ds::sdk::trainable weight;
  std::array<const ds_parameter*, 1> all;
};

DS_PLUGIN("org.driftstone.example.patch-mean", "1.0.0", "Apache-2.0", patch_mean)
