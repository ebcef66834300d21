// SPDX-License-Identifier: Apache-2.0
// A disk under RocksDB that fills up, fails, and loses what was not synced. A SIGKILL alone loses
// nothing that was written, synced or not; with `lose_unsynced` the bytes wait in the process until
// their sync, so that a kill is a power cut. lose_unsynced_names() then does the same to names.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

namespace rocksdb {
class FileSystem;
}

namespace ds {

struct DiskFaults {
  std::atomic<int64_t> free_bytes{INT64_MAX};  ///< an append beyond writes what fits, then fails
  std::atomic<bool> syncs_fail{false};         ///< with an I/O error, as a dying device's
  bool lose_unsynced = false;
  std::string journal_folder;  ///< with lose_unsynced: where names and replaced files are noted
};

std::shared_ptr<rocksdb::FileSystem> make_test_disk(std::shared_ptr<DiskFaults> faults);

/// After a kill: cuts bytes off that were never synced, removes files whose folder was not synced
/// since their creation, and puts back what an unsynced rename replaced. Empties the journal.
void lose_unsynced_names(const std::string& journal_folder);

}  // namespace ds
