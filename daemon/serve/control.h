// SPDX-License-Identifier: Apache-2.0
// What the HTTP side needs from parts it must not include (learn/): functions that main.cpp binds.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "ds/status.h"
#include "storage/json.h"

namespace ds {

/// Answers of long work arrive later, on any thread.
using JsonCallback = std::function<void(Result<Json>)>;

struct LearnControl {
  std::function<Json()> status;  ///< state, queued, round, step, loss, lag_s, ...
  std::function<void(bool wait, JsonCallback)> step;  ///< starts a round now; outcome when it ends
  std::function<Status(bool paused)> set_paused;
  std::function<void(const std::string& id, JsonCallback)> undo;  ///< feedback rm ID
};

/// Task models (MLP classifiers) beside the language model.
struct TaskModelControl {
  std::function<Result<Json>(const std::string& name, const std::vector<int64_t>& sizes)> create;
  std::function<Json()> list;
  /// {label, scores, version} for one input row, FP32.
  std::function<void(const std::string& name, std::vector<float> input, JsonCallback)> infer;
  std::function<Result<Json>(const std::string& name)> versions;
};

}  // namespace ds
