// SPDX-License-Identifier: Apache-2.0
#include "engine/stop_text.h"

#include <algorithm>

namespace ds {

std::string StopText::push(std::string_view text) {
  if (stopped_) return {};
  if (stop_.empty()) return std::string(text);
  pending_ += text;

  size_t begin = std::string::npos, end = std::string::npos;
  for (const std::string& stop : stop_) {
    const size_t at = pending_.find(stop);
    if (at == std::string::npos) continue;
    const size_t stop_end = at + stop.size();
    if (stop_end < end || (stop_end == end && at < begin)) begin = at, end = stop_end;
  }
  if (begin != std::string::npos) {
    stopped_ = true;
    std::string out = pending_.substr(0, begin);
    pending_.clear();
    return out;
  }
  const size_t ready = pending_.size() - held_back();
  std::string out = pending_.substr(0, ready);
  pending_.erase(0, ready);
  return out;
}

std::string StopText::flush() {
  std::string out = std::move(pending_);
  pending_.clear();
  return stopped_ ? std::string() : out;
}

size_t StopText::held_back() const {
  size_t longest = 0;
  for (const std::string& stop : stop_) {
    for (size_t n = std::min(stop.size() - 1, pending_.size()); n > longest; --n) {
      if (std::string_view(pending_).ends_with(std::string_view(stop).substr(0, n))) longest = n;
    }
  }
  return longest;
}

}  // namespace ds
