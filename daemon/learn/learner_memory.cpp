// SPDX-License-Identifier: Apache-2.0
#include "learn/learner_memory.h"

#include <cstring>

namespace ds {
namespace {

constexpr std::string_view kState = "learner.state", kVector = "learner.vector.";

}  // namespace

std::vector<StoredTensor> memory_tensors(const LearnerMemory& memory) {
  std::vector<StoredTensor> out;
  if (!memory.state.empty())
    out.push_back({std::string(kState), "U8", {std::ssize(memory.state)}, memory.state});
  for (const auto& [name, values] : memory.vectors) {
    std::string bytes(values.size() * sizeof(float), '\0');
    std::memcpy(bytes.data(), values.data(), bytes.size());
    out.push_back({std::string(kVector) + name, "F32", {std::ssize(values)}, std::move(bytes)});
  }
  return out;
}

Result<LearnerMemory> take_memory(const VersionManifest& version,
                                  std::vector<StoredTensor>& checkpoint) {
  LearnerMemory out;
  const Json learner = version.details.value("learner", Json::object());
  out.learner = learner.value("name", "");
  out.version = learner.value("version", "");
  for (const StoredTensor& t : checkpoint) {
    if (t.name == kState) out.state = t.data;
    if (!t.name.starts_with(kVector)) continue;
    if (t.dtype != "F32")
      return Status(Code::kCorrupt, t.name + ": dtype " + t.dtype + ", expected F32");
    std::vector<float>& values = out.vectors[t.name.substr(kVector.size())];
    values.resize(t.data.size() / sizeof(float));
    std::memcpy(values.data(), t.data.data(), values.size() * sizeof(float));
  }
  std::erase_if(checkpoint, [](const StoredTensor& t) {
    return t.name == kState || t.name.starts_with(kVector);
  });
  return out;
}

}  // namespace ds
