// SPDX-License-Identifier: Apache-2.0
// The bases of one model: that of the model file, and those made from it by full fine-tuning.
//
// At most two are kept in memory for whoever comes next. A third pushes out the oldest that nobody
// decodes with, else the oldest, which then lives until its last sequence ends. What was pushed out
// is read again when it is asked for. Thread-safe.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/model.h"
#include "storage/base_store.h"

namespace ds {

class Bases {
 public:
  /// Both outlive this object.
  Bases(const ModelFile& file, const BaseStore& store, WeightForm form)
      : file_(file), store_(store), form_(std::move(form)) {}

  const ModelConfig& config() const { return file_.config(); }
  const std::string& file_sha256() const { return file_.sha256(); }
  WeightFormat format() const { return form().format; }
  WeightForm form() const;
  /// What bases are kept in from now on. Those in memory are made anew when they are asked for, or
  /// shared when the new quantizer takes their weights as they are.
  void set_form(WeightForm form);

  /// The base with this SHA-256, from memory or from disk. Slow when read; one is read at a time.
  Result<std::shared_ptr<const BaseWeights>> find(const std::string& sha256,
                                                  const Compute& compute);
  /// Keeps a base that was made just now, as if it had been read.
  void add(const std::shared_ptr<const BaseWeights>& base);
  /// Every tensor in FP32: what full fine-tuning goes on from.
  Result<NamedTensors> masters(const std::string& sha256) const;
  /// Lets go of those that nobody decodes with: memory for whoever found none. False: there are
  /// none.
  bool drop_idle();
  size_t kept() const;  ///< bases held for later, at most two

 private:
  void keep(const std::shared_ptr<const BaseWeights>& base);  ///< mutex_ held

  const ModelFile& file_;
  const BaseStore& store_;
  mutable std::mutex mutex_;
  WeightForm form_;
  std::vector<std::shared_ptr<const BaseWeights>> kept_;          ///< oldest first
  std::map<std::string, std::weak_ptr<const BaseWeights>> live_;  ///< by SHA-256
};

}  // namespace ds
