// SPDX-License-Identifier: Apache-2.0
// Backups of a data folder: the replay store, models/ and bases/, and a manifest.json with the
// SHA-256 of every file. Layout of both: FORMAT.md, "The data folder" and "Backups".
#pragma once

#include <string>

#include "ds/status.h"
#include "storage/json.h"
#include "storage/replay_store.h"
#include "storage/seams.h"

namespace ds {

/// While the daemon runs. `target` must not exist; it appears complete or not at all. The store is
/// copied first, so every version that it names and that is not removed meanwhile is in the copy.
Status create_backup(const ReplayStore& store, FileSystem& fs, const std::string& data_dir,
                     const std::string& target);

/// The manifest, when every file is there, unchanged, and there is no other. Names the first that
/// differs (kCorrupt).
Result<Json> verify_backup(FileSystem& fs, const std::string& dir);

/// Verifies, then copies into `data_dir`, which must be empty, absent, or left by an interrupted
/// restore. The replay store comes last: a data folder without it was not restored completely.
Status restore_backup(FileSystem& fs, const std::string& dir, const std::string& data_dir);

}  // namespace ds
