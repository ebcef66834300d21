// SPDX-License-Identifier: Apache-2.0
// config.json: an accepted config has numbers whose tensor sizes fit 63 bits.
#include "storage/hf_folder.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto json = ds::parse_json({reinterpret_cast<const char*>(data), size});
  if (!json.ok()) return 0;
  auto config = ds::parse_hf_config(*json);
  if (!config.ok()) return 0;
  config->n_layers = 1;  // the readers bound it by the number of tensors in the file
  for (const ds::ExpectedTensor& tensor : ds::llama_tensors(*config)) {
    int64_t bytes = 4;
    for (const int64_t dim : tensor.shape) {
      DS_CHECK(dim > 0 && !__builtin_mul_overflow(bytes, dim, &bytes));
    }
  }
  return 0;
}
