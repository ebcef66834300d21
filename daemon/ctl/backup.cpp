// SPDX-License-Identifier: Apache-2.0
// backup: create asks the daemon for a consistent copy; verify and restore work on files, without
// one.
#include "storage/backup.h"

#include <filesystem>

#include "ctl/commands.h"
#include "ctl/output.h"
#include "ctl/progress.h"

namespace ds::ctl {
namespace {

/// The daemon's working folder is another one: paths travel absolute.
std::string absolute(const std::string& path) {
  std::error_code error;
  const auto full = std::filesystem::absolute(path, error);
  return error ? path : full.lexically_normal().string();
}

}  // namespace

int backup_create(Session& session, const std::string& path) {
  Progress progress("backup", 0);
  const auto reply = watched(
      [&] {
        return session.post("/ds/v1/backup", {{"path", absolute(path)}}, Patience::kLong);
      },
      [&] { progress.update(0); });
  progress.clear();
  if (!reply.ok()) return session.fail(reply.status(), "the folder must not exist yet");
  if (session.json()) {
    session.document("ds.Backup/1", *reply);
  } else {
    session.print(text_at(*reply, "path") + "  " + count_text(integer_at(*reply, "files")) +
                  " files  " + size_text(number_at(*reply, "bytes").value_or(0)) + "\n");
  }
  return kDone;
}

int backup_verify(Session& session, const std::string& path) {
  Progress progress("backup verify", 0);
  const auto manifest = watched([&] { return verify_backup(posix_file_system(), path); },
                                [&] { progress.update(0); });
  progress.clear();
  if (!manifest.ok())
    return session.fail(manifest.status(), "take another backup: dsctl backup create");
  if (session.json()) {
    session.document("ds.Backup/1", *manifest);
  } else {
    session.print("good, " + path + "\n");
  }
  return kDone;
}

int backup_restore(Session& session, const std::string& path, const std::string& data_dir) {
  int exit = kDone;
  if (!session.confirmed("restore " + path + " into " + data_dir, exit)) return exit;
  Progress progress("backup restore", 0);
  const auto done = watched(
      [&]() -> Result<Json> {
        DS_TRY(restore_backup(posix_file_system(), path, data_dir));
        return Json{{"path", path}, {"data", data_dir}};
      },
      [&] { progress.update(0); });
  progress.clear();
  if (!done.ok())
    return session.fail(done.status(), "restore into an empty folder, with dsd stopped");
  if (session.json()) {
    session.document("ds.Restore/1", *done);
  } else {
    session.print("restored into " + data_dir + "; start dsd with it as --data\n");
  }
  return kDone;
}

}  // namespace ds::ctl
