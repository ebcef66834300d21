// SPDX-License-Identifier: Apache-2.0
#include "engine/gradient_mirrors.h"

namespace ds {

float* GradientMirrors::of(std::span<float> host) {
  const Ops& ops = *compute_.ops;
  if (ops.host_memory) return host.data();
  Mirror& mirror = mirrors_[host.data()];
  if (!mirror.used) {
    mirror.used = true;
    mirror.host = host;
    mirror.there.at_least(ops, host.size_bytes());
    ops.zero(compute_.context, mirror.there.data(), static_cast<int64_t>(host.size_bytes()));
  }
  return mirror.there.as<float>();
}

Status GradientMirrors::add_back() {
  const Ops& ops = *compute_.ops;
  for (auto& [address, mirror] : mirrors_) {
    if (!mirror.used) continue;
    mirror.used = false;
    fetched_.resize(mirror.host.size());
    ops.download(compute_.context, fetched_.data(), mirror.there.data(),
                 static_cast<int64_t>(mirror.host.size_bytes()));
    DS_TRY(finish(compute_));
    for (size_t i = 0; i < fetched_.size(); ++i) mirror.host[i] += fetched_[i];
  }
  return {};
}

}  // namespace ds
