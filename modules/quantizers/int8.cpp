// SPDX-License-Identifier: Apache-2.0
// Weights in 8 bits, symmetric, times activations in 8 bits.
#include "modules/quantizers/codes.h"

namespace ds::modules {

struct Int8 : CodeQuantizer<8> {
  using CodeQuantizer::CodeQuantizer;
  static constexpr std::string_view name = "int8";
  static constexpr std::string_view summary = "8 bits, symmetric, scale by group of 32 or by row";
  static constexpr std::string_view config_schema =
      R"({"type":"object","additionalProperties":false,"properties":{)"
      R"("group":{"type":"integer","enum":[0,32],"default":32,"description":"weights of a row that )"
      R"(share a scale; 0 = all"}}})";
};

}  // namespace ds::modules

DS_PLUGIN("org.driftstone.quantizer-int8", "1.0.0", "Apache-2.0", ds::modules::Int8)
