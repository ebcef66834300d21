// SPDX-License-Identifier: Apache-2.0
// Steps of a GPU recorded once and replayed: a decode step is some 150 short kernels, which take
// longer to launch one by one than to run (CUDA graphs; research figures in kernels/README.md).
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <vector>

#include "ds/status.h"
#include "kernels/ops.h"

namespace ds {

class StepRecordings {
 public:
  /// Everything that a recording has in it: sizes, which weights, where memory is. What may differ
  /// between steps of one key is only what kernels read from memory.
  using Key = std::vector<uint64_t>;

  /// `most`: how many are kept, those of the keys used last. One of 300 kernels takes about 1 MB.
  StepRecordings(const Ops& ops, const OpContext& context, size_t most = 64)
      : ops_(ops), context_(context), most_(most) {}
  ~StepRecordings();
  StepRecordings(const StepRecordings&) = delete;
  void clear();

  /// Does what `enqueue` does. The first time of a key it just runs, so that memory that it needs
  /// is there; the second time it is recorded; then the recording is replayed.
  Status run(Key key, const std::function<Status()>& enqueue);

 private:
  struct Entry {
    int times = 0;
    void* recording = nullptr;  ///< null after the second time: this step cannot be recorded
    std::list<Key>::iterator use;
  };
  void forget_oldest();

  const Ops& ops_;
  OpContext context_;
  const size_t most_;
  std::map<Key, Entry> entries_;
  std::list<Key> uses_;  ///< least recently used first
};

}  // namespace ds
