// SPDX-License-Identifier: Apache-2.0
#include "engine/bases.h"

#include <algorithm>

namespace ds {
namespace {

constexpr size_t kKeptBases = 2;

}  // namespace

Result<std::shared_ptr<const BaseWeights>> Bases::find(const std::string& sha256,
                                                       const Compute& compute) {
  std::lock_guard lock(mutex_);
  std::shared_ptr<const BaseWeights> base = live_[sha256].lock();
  if (base == nullptr && sha256 == file_.sha256()) {
    DS_ASSIGN(base, BaseWeights::load(file_, compute, form_));
  } else if (base == nullptr) {
    DS_ASSIGN(const NamedTensors tensors, store_.read(sha256, file_.config()));
    DS_ASSIGN(base, BaseWeights::from_tensors(file_.config(), tensors, sha256, compute, form_));
  }
  keep(base);
  return base;
}

WeightForm Bases::form() const {
  std::lock_guard lock(mutex_);
  return form_;
}

void Bases::set_form(WeightForm form) {
  std::lock_guard lock(mutex_);
  form_ = std::move(form);
  const std::vector<std::shared_ptr<const BaseWeights>> before = std::move(kept_);
  kept_.clear();
  live_.clear();
  for (const auto& base : before) {
    if (auto same = base->with(form_.quantizer)) keep(same);
  }
}

void Bases::add(const std::shared_ptr<const BaseWeights>& base) {
  std::lock_guard lock(mutex_);
  keep(base);
}

void Bases::keep(const std::shared_ptr<const BaseWeights>& base) {
  std::erase(kept_, base);
  kept_.push_back(base);
  live_[base->sha256()] = base;
  if (kept_.size() <= kKeptBases) return;
  const auto last = kept_.end() - 1;  // the one that is asked for
  const auto idle =
      std::find_if(kept_.begin(), last, [](const auto& kept) { return kept.use_count() == 1; });
  kept_.erase(idle != last ? idle : kept_.begin());
  std::erase_if(live_, [](const auto& entry) { return entry.second.expired(); });
}

Result<NamedTensors> Bases::masters(const std::string& sha256) const {
  if (sha256 != file_.sha256()) return store_.read(sha256, file_.config());
  return file_.read_all_f32();
}

bool Bases::drop_idle() {
  std::lock_guard lock(mutex_);
  return std::erase_if(kept_, [](const auto& kept) { return kept.use_count() == 1; }) > 0;
}

size_t Bases::kept() const {
  std::lock_guard lock(mutex_);
  return kept_.size();
}

}  // namespace ds
