// SPDX-License-Identifier: Apache-2.0
// The replay store: every feedback record, its fate, the reservoirs that rehearsal draws from,
// response traces, rounds. RocksDB underneath (column_store.cpp is the only file that knows it);
// byte formats in FORMAT.md. An append is acknowledged only after its synced write; writers are
// group-committed.
//
// Thread-safe. Callbacks run on the store's writer thread and must not block.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ds/status.h"
#include "storage/json.h"
#include "storage/seams.h"

namespace rocksdb {
class FileSystem;
}

namespace ds {

struct Submission {
  std::string client;          ///< see check_label()
  int64_t epoch = 0, seq = 0;  ///< epoch from 0, seq from 1
  Json record;                 ///< as sent; checked by check_record() inside
  std::vector<std::string> attachments;
  bool admin = false;  ///< a retraction may name an item of any source, not only of its own
};

struct Ack {
  uint64_t offset = 0;
  std::string id;
  bool duplicate = false;
};

/// Why a submission was refused, for the wire: code in {bad_record, forbidden, seq_conflict, seq_gap,
/// stale_epoch, storage_full, busy, shutting_down}. Refused = definitely not stored.
struct Refusal {
  std::string code, message;
  int64_t expected_seq = 0;    ///< with seq_gap
  int64_t retry_after_ms = 0;  ///< 0 = retrying is useless
};
using SubmitCallback =
    std::function<void(const Ack*, const Refusal*)>;  ///< exactly one is non-null

/// stored > queued > trained > served > reverted, or quarantined, held, waiting, expired, erased.
/// Another state is refused; the order of states is the learner's business.
struct FateEntry {
  std::string state;
  int64_t at_ms = 0;
  std::string version;  ///< when it concerns one
  int64_t step = 0;
  std::string reason;
};

struct FeedbackItem {
  uint64_t offset = 0;
  std::string id, client, source, kind, domain;
  int64_t epoch = 0, seq = 0, received_ms = 0;
  std::string draw_key;  ///< record hash + "#" + occurrence number, from 0
  /// As check_record() normalised it. Where a correction, rating or preference cites a response and
  /// brings no messages, "joined" holds {"messages", "rejected" (the answer), "version"} of the
  /// trace.
  Json record;
  std::vector<std::string> attachments;
  std::vector<FateEntry> fate;  ///< oldest first; back() is the present one
};

struct FeedbackFilter {
  std::string state, source, kind;  ///< empty = any
  uint64_t after_offset = 0;  ///< where the last page ended, in the order asked for; 0 = begin
  int limit = 100;
  bool newest_first = false;
};

/// What was asked and answered, so that feedback can cite it by response id. Not synced; expires.
struct Trace {
  std::string response_id, version, source;
  int64_t at_ms = 0;
  Json messages;  ///< the prompt's messages, or {"prompt": "..."}
  std::string answer;
};

/// A slot of a reservoir: domain, draw key, offset of the record.
struct Example {
  std::string domain, draw_key;
  uint64_t offset = 0;
};

struct FateChange {
  uint64_t offset = 0;
  FateEntry entry;
};

/// Everything that becomes true together when a round ends: one synced WriteBatch.
struct Commit {
  std::vector<FateChange> fates;
  /// Reservoir changes; removals first. A full reservoir keeps the smallest draws, so the order of
  /// insertions never matters.
  std::vector<Example> insert, remove;
  std::vector<std::pair<uint64_t, Json>> rounds;    ///< round number -> record
  std::vector<std::pair<std::string, Json>> meta;   ///< name -> value; null erases
  std::vector<std::pair<std::string, Json>> hold;   ///< held-out clusters; null erases
  std::vector<std::pair<std::string, Json>> drift;  ///< drift baselines; null erases
};

class ReplayStore {
 public:
  struct Options {
    std::string directory;
    FileSystem* fs = nullptr;  ///< for side files; RocksDB uses its own Env
    Clock* clock = nullptr;
    uint64_t reservoir_slots = 2048;  ///< per domain
    uint64_t seed = 0;                ///< of the reservoirs; another one re-sorts them at open
    size_t max_pending_items = 4096;  ///< not yet synced; beyond: busy
    size_t max_pending_bytes = 64u << 20;
    size_t max_record_bytes = 1u << 20;  ///< JSON; attachments have their own limit
    size_t max_attachment_bytes = 16u << 20;
    int64_t trace_ttl_ms = 7LL * 86400000;
    uint64_t trace_max_bytes = 256ull << 20;
    /// What RocksDB reads and writes through, so that tests can cut the power; null = the machine.
    std::shared_ptr<rocksdb::FileSystem> disk;
  };

  /// Opens or creates. A second process on the same directory is refused by name; a newer format is
  /// refused with both numbers.
  static Result<std::unique_ptr<ReplayStore>> open(const Options& options);
  ~ReplayStore();  ///< finishes pending appends

  std::string store_id() const;  ///< uuid, made at creation
  int64_t last_seq(const std::string& client, int64_t epoch) const;

  /// Queues an append; the callback fires once, after the sync or with the refusal. Never blocks.
  /// What can be refused at once (busy, shutting_down, sizes) is, on the calling thread.
  void submit(Submission submission, SubmitCallback callback);
  /// The same, waiting.
  Result<Ack> submit_and_wait(Submission submission);

  Result<FeedbackItem> get(uint64_t offset) const;
  Result<FeedbackItem> get(const std::string& id) const;
  std::vector<FeedbackItem> list(const FeedbackFilter& filter) const;
  std::vector<uint64_t> offsets_in_state(const std::string& state) const;  ///< ascending
  /// (offset, kind), ascending, from the index alone: no record is read, except those whose state was
  /// written before the index held kinds. The kind of a record that cannot be read is "".
  std::vector<std::pair<uint64_t, std::string>> kinds_in_state(const std::string& state) const;
  uint64_t last_offset() const;                                            ///< 0 = empty

  /// All of it or nothing; kNotFound for a fate of an unknown offset.
  Status commit(const Commit& commit);

  std::vector<Example> examples(const std::string& domain) const;  ///< by draw key
  std::vector<std::string> domains() const;

  Status put_trace(const Trace& trace);  ///< not synced; may wait for a sync in progress
  Result<Trace> get_trace(const std::string& response_id) const;  ///< expired = kNotFound

  Result<Json> round(uint64_t number) const;
  std::vector<std::pair<uint64_t, Json>> rounds(uint64_t from) const;
  uint64_t last_round() const;  ///< the greatest number; 0 = none
  std::optional<Json> meta(const std::string& name) const;
  std::vector<std::pair<std::string, Json>> hold() const;   ///< by name
  std::vector<std::pair<std::string, Json>> drift() const;  ///< by name

  Json stats() const;     ///< counts by state, kind, source and domain; bytes; pending
  Status verify() const;  ///< checksums of RocksDB and of every record; names the first bad one
  /// Ok, or why writes fail now. They resume by themselves when space returns; after an I/O error
  /// of the device only a restart helps.
  Status health() const;
  /// Consistent copy while running (hard links), a store directory itself. `directory` must not
  /// exist.
  Status backup(const std::string& directory) const;

 private:
  ReplayStore();
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ds
