// SPDX-License-Identifier: Apache-2.0
// Inside of the replay store, shared by its two halves: replay_store.cpp (opening, the writer,
// commits) and replay_reads.cpp (everything that only reads, traces).
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "storage/column_store.h"
#include "storage/directory_lock.h"
#include "storage/replay_store.h"

namespace ds {

struct ReplayStore::State {
  struct Queued {
    Submission submission;
    std::string canonical;  ///< of submission.record
    size_t bytes = 0;
    SubmitCallback callback;
  };
  /// One of the two.
  struct Outcome {
    std::optional<Ack> ack;
    Refusal refusal;
  };

  Options options;
  std::unique_ptr<DirectoryLock> lock;
  std::unique_ptr<ColumnStore> columns;
  std::string store_id;
  std::atomic<uint64_t> last_offset{0};

  std::mutex queue_mutex;
  std::condition_variable queue_ready;
  std::deque<Queued> queue;
  size_t pending_items = 0, pending_bytes = 0;  ///< queued or being written
  bool stopping = false;
  std::thread writer;

  /// Held from the first read of a batch to the end of its write: rules are checked against what is
  /// stored, so checks and writes of two batches must not interleave.
  std::mutex write_mutex;
  std::atomic<uint64_t> batches{0}, appended{0};

  mutable std::mutex trace_mutex;  ///< of the two totals, and of put_trace() as a whole
  uint64_t traces = 0, trace_bytes = 0;

  Status prepare();
  Status resort_reservoirs(Batch& batch) const;
  Status sum_traces();

  std::optional<Refusal> enqueue(Queued queued);
  void write_loop();
  std::vector<Outcome> append(const std::vector<Queued>& group);
  Result<Outcome> admit(Batch& batch, const Queued& queued, uint64_t& next_offset, int64_t now_ms);
  Result<std::optional<Outcome>> judge_sequence(const Batch& batch, const Queued& queued,
                                                const Sha256Digest& payload) const;
  Result<std::optional<Refusal>> resolve(const Batch& batch, const Submission& sent, Json& record) const;
  Result<std::optional<Refusal>> judge_retraction(const Batch& batch, const Submission& sent,
                                                  const Json& record) const;
  Status insert(Batch& batch, FeedbackItem& item, const Sha256Digest& payload);
  Status change_fate(Batch& batch, const FateChange& change) const;
  Status change_reservoirs(Batch& batch, const Commit& commit) const;
  Status trim_traces(Batch& batch, uint64_t& count, uint64_t& bytes) const;

  Result<FeedbackItem> read_item(std::string_view log_key) const;
  Result<std::vector<std::pair<std::string, uint64_t>>> counts(const std::string& group) const;
};

/// Adds `change` to a counter kept in the batch's own write, so that counts never drift.
Status add_count(Batch& batch, std::string_view group, std::string_view name, int64_t change);

}  // namespace ds
