// SPDX-License-Identifier: Apache-2.0
#include "engine/step_recordings.h"

#include <utility>

namespace ds {

StepRecordings::~StepRecordings() { clear(); }

void StepRecordings::clear() {
  for (auto& [key, entry] : entries_) ops_.release_recording(entry.recording);
  entries_.clear();
  uses_.clear();
}

void StepRecordings::forget_oldest() {
  const auto oldest = entries_.find(uses_.front());
  ops_.release_recording(oldest->second.recording);
  entries_.erase(oldest);
  uses_.pop_front();
}

Status StepRecordings::run(Key key, const std::function<Status()>& enqueue) {
  key.push_back(ops_.recording_place(context_));
  auto found = entries_.find(key);
  if (found == entries_.end()) {
    if (entries_.size() == most_) forget_oldest();
    found = entries_.emplace(key, Entry{0, nullptr, uses_.insert(uses_.end(), key)}).first;
  }
  Entry& entry = found->second;
  uses_.splice(uses_.end(), uses_, entry.use);
  if (entry.times < 2 && ++entry.times == 2 && ops_.begin_recording(context_)) {
    const Status recorded = enqueue();
    entry.recording = ops_.end_recording(context_);
    if (!recorded.ok()) {  // a part of a step is not kept
      ops_.release_recording(std::exchange(entry.recording, nullptr));
      entry.times = 0;
      return recorded;
    }
  }
  if (entry.recording == nullptr) return enqueue();
  ops_.replay(context_, entry.recording);
  return {};
}

}  // namespace ds
