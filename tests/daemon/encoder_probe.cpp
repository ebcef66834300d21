// SPDX-License-Identifier: Apache-2.0
// Encoders for the tests of the engine: rows from the ids alone, and some that cannot serve.
#include <cmath>

#include "ds/plugin.hpp"

namespace {

enum Sort { kOwnRows, kDeaf, kOtherTensor, kTooWide, kFails };
constexpr std::string_view kNames[] = {"own-rows", "deaf", "other-tensor", "too-wide", "fails"};

/// Rows of `width` (config): a wave whose frequency is the id. It has no backward.
template <Sort S>
struct Encoder {
  static constexpr std::string_view name = kNames[S];
  static constexpr std::string_view config_schema =
      R"({"type":"object","additionalProperties":false,
          "properties":{"width":{"type":"integer","default":64}}})";
  static constexpr std::uint32_t modalities = 1u << (S == kDeaf ? DS_MOD_AUDIO : DS_MOD_TEXT);
  static constexpr std::array<ds_str, S == kOtherTensor> tensor_names{};

  explicit Encoder(ds::sdk::context context) : width_(context.get("width", std::int64_t{64})) {}

  ds_plan plan(const ds_encode_args& a) const {
    ds_plan out{};
    out.shape[0] = ds::sdk::dim(ds::sdk::widened(a.media).data, "ids", 1, 0);
    out.shape[1] = width_ + (S == kTooWide);
    return out;
  }
  void encode(const ds_call&, const ds_encode_args& a) const {
    if (S == kFails) throw ds::sdk::error(DS_E_DATA, "not today");
    const auto ids = ds::sdk::flat<const std::int32_t>(ds::sdk::widened(a.media).data, "ids", {-1});
    const auto out = ds::sdk::flat<float>(a.out, "out", {std::ssize(ids), width_});
    for (std::size_t i = 0; i < out.size(); ++i) {
      const auto row = i / static_cast<std::size_t>(width_),
                 at = i % static_cast<std::size_t>(width_);
      out[i] = std::sin(0.01f * static_cast<float>(ids[row]) * static_cast<float>(at + 1));
    }
  }

 private:
  std::int64_t width_;
};

}  // namespace

DS_PLUGIN("org.driftstone.encoder-probe", "1.0.0", "Apache-2.0", Encoder<kOwnRows>, Encoder<kDeaf>,
          Encoder<kOtherTensor>, Encoder<kTooWide>, Encoder<kFails>)
