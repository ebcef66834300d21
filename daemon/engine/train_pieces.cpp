// SPDX-License-Identifier: Apache-2.0
// Pieces of a training pass, recorded and replayed on a GPU (step_recordings.h).
#include <bit>

#include "engine/train_graph.h"

namespace ds {
namespace {

/// From so many rows on launches are quicker than what they launch, and a recording would hold the
/// stream for longer than serving may wait.
constexpr int64_t kMostRecordedRows = 3072;

}  // namespace

/// Enqueues it, recorded where passes of that many rows are: the second time of a key.
void TrainGraph::run_piece(Piece piece, int64_t layer, const std::function<void()>& enqueue) {
  if (!status_.ok()) return;
  if (key_.empty()) return enqueue();
  StepRecordings::Key key = key_;
  key.push_back(static_cast<uint64_t>(piece));
  key.push_back(static_cast<uint64_t>(layer));
  note(recordings_.run(std::move(key), [&] {
    enqueue();
    return status_;
  }));
}

bool TrainGraph::is_recorded(int64_t rows) const {
  return !compute_.ops->host_memory && rows <= kMostRecordedRows;
}

/// Rows that are added so that passes of nearly as many rows share their recordings: few, where
/// they cost time.
int64_t TrainGraph::padding_of(int64_t rows) const {
  if (!is_recorded(rows)) return 0;
  const int64_t step = rows <= 1024 ? 32 : 64;
  return (rows + step - 1) / step * step - rows;
}

/// Everything that the pieces' recordings have in them.
void TrainGraph::set_key(const BaseWeights& base, const Adapters* adapters,
                         const FullGradients* full) {
  key_.clear();
  if (!is_recorded(rows_)) return;
  key_ = {static_cast<uint64_t>(rows_), static_cast<uint64_t>(max_rows_), base.serial()};
  const auto address = [&](const void* at) { key_.push_back(reinterpret_cast<uint64_t>(at)); };
  for (const Buffer* workspace :
       {&layers_[0].x, &prepared_, &prepared_dy_, &prepared_dup_, &prepared_dv_, &prepared_dx_,
        &scratch_.prepared, &scratch_.workspace, &scratch_.up, &scratch_.lora, &saturated_})
    address(workspace->data());
  address(ids_);
  address(full != nullptr ? full->all().data() : nullptr);
  if (adapters != nullptr) {
    address(adapters->packs());
    address(adapters->gradient().data());
    key_.insert(key_.end(), {static_cast<uint64_t>(adapters->rank()), adapters->targets(),
                             std::bit_cast<uint32_t>(adapters->scale())});
  }
  for (size_t i = 0; i < formats_.n_inputs(); ++i) {
    if (formats_.fell(i)) key_.push_back(i);
  }
}

}  // namespace ds
