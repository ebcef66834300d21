// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "storage/model_file.h"

namespace ds::test {

/// All elements of a tensor.
inline std::vector<float> read(const ModelFile& file, const std::string& name) {
  std::vector<float> out(static_cast<size_t>(elements_of(file.tensors().at(name).shape)));
  const Status status = file.read_f32(name, out);
  EXPECT_TRUE(status.ok()) << status.message();
  return out;
}

}  // namespace ds::test
