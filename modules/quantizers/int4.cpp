// SPDX-License-Identifier: Apache-2.0
// Weights in 4 bits on a grid with an offset, found by a search that needs no training, times
// activations in 8 bits.
#include "modules/quantizers/codes.h"

namespace ds::modules {

struct Int4 : CodeQuantizer<4> {
  using CodeQuantizer::CodeQuantizer;
  static constexpr std::string_view name = "int4";
  static constexpr std::string_view summary = "4 bits with offset, scale by group of 32 or by row";
  static constexpr std::string_view config_schema =
      R"({"type":"object","additionalProperties":false,"properties":{)"
      R"("head_bits":{"type":"integer","enum":[4,8],"default":8,"description":"of matrices with more )"
      R"(than 12 rows per column"},)"
      R"("group":{"type":"integer","enum":[0,32],"default":32,"description":"weights of a row that )"
      R"(share a scale; 0 = all"}}})";
};

}  // namespace ds::modules

DS_PLUGIN("org.driftstone.quantizer-int4", "1.0.0", "Apache-2.0", ds::modules::Int4)
