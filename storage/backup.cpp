// SPDX-License-Identifier: Apache-2.0
#include "storage/backup.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <vector>

#include "storage/hash.h"

namespace ds {
namespace {

constexpr int kBackupFormat = 1;
constexpr const char* kBackupManifest = "manifest.json";
constexpr const char* kRestoring = ".restore.tmp";
constexpr const char* kParts[] = {"models", "bases", "replay"};  // restored in this order

/// Paths below `root`/`relative` in bytewise order. What can be listed is a folder. Temporary names
/// are what a running process has not finished: they are no part of the data.
Status walk(FileSystem& fs, const std::string& root, const std::string& relative,
            std::vector<std::string>& files) {
  DS_ASSIGN(const std::vector<std::string> names, fs.list(root + "/" + relative));
  for (const std::string& name : names) {
    if (name.ends_with(".tmp")) continue;
    const std::string path = relative.empty() ? name : relative + "/" + name;
    if (fs.list(root + "/" + path).ok()) {
      DS_TRY(walk(fs, root, path, files));
    } else {
      files.push_back(path);
    }
  }
  return {};
}

std::string parent_of(const std::string& path) {
  return std::filesystem::path(path).parent_path().string();
}

/// Makes every folder that holds one of `files`, up to `root` itself, durable.
Status sync_folders(FileSystem& fs, const std::string& root,
                    const std::vector<std::string>& files) {
  std::set<std::string> folders{""};
  for (const std::string& file : files) {
    for (std::string at = parent_of(file); !at.empty(); at = parent_of(at)) folders.insert(at);
  }
  for (const std::string& folder : folders) {
    DS_TRY(fs.sync_directory(folder.empty() ? root : root + "/" + folder));
  }
  return {};
}

Status copy_file(FileSystem& fs, const std::string& from, const std::string& to) {
  DS_ASSIGN(const std::string bytes, fs.read(from));
  DS_TRY(fs.make_directories(parent_of(to)));
  return write_file_synced(fs, to, bytes);
}

Status copy_parts(FileSystem& fs, const std::string& data_dir, const std::string& target) {
  for (const char* part : {"models", "bases"}) {
    if (!fs.exists(data_dir + "/" + part)) continue;
    std::vector<std::string> files;
    DS_TRY(walk(fs, data_dir, part, files));
    for (const std::string& file : files) {
      const Status copied = copy_file(fs, data_dir + "/" + file, target + "/" + file);
      // A version removed meanwhile is no part of the backup.
      if (!copied.ok() && copied.code() != Code::kNotFound) return copied;
    }
  }
  return {};
}

/// A path that stays below the folder it is joined to.
bool is_relative(const std::string& path) {
  if (path.empty() || path.front() == '/') return false;
  for (const auto& part : std::filesystem::path(path)) {
    if (part == ".." || part == ".") return false;
  }
  return true;
}

}  // namespace

Status create_backup(const ReplayStore& store, FileSystem& fs, const std::string& data_dir,
                     const std::string& target) {
  if (fs.exists(target)) return conflict("backup " + target + " exists already");
  const std::string temporary = target + ".tmp";
  if (fs.exists(temporary)) DS_TRY(fs.remove_all(temporary));
  DS_TRY(fs.make_directories(temporary));
  DS_TRY(store.backup(temporary + "/replay"));
  DS_TRY(copy_parts(fs, data_dir, temporary));
  std::vector<std::string> files;
  DS_TRY(walk(fs, temporary, "", files));
  Json list = Json::array();
  for (const std::string& file : files) {
    DS_ASSIGN(const std::string bytes, fs.read(temporary + "/" + file));
    list.push_back({{"path", file}, {"bytes", bytes.size()}, {"sha256", to_hex(sha256(bytes))}});
  }
  const Json manifest = {{"format", kBackupFormat},
                         {"store_id", store.store_id()},
                         {"last_offset", store.last_offset()},
                         {"files", list}};
  DS_TRY(write_file_synced(fs, temporary + "/" + kBackupManifest, dump_json(manifest, 1) + "\n"));
  files.push_back(kBackupManifest);
  DS_TRY(sync_folders(fs, temporary, files));
  DS_TRY(fs.rename(temporary, target));
  const std::string parent = parent_of(target);
  return fs.sync_directory(parent.empty() ? "." : parent);
}

Result<Json> verify_backup(FileSystem& fs, const std::string& dir) {
  DS_ASSIGN(const std::string text, fs.read(dir + "/" + kBackupManifest));
  auto manifest = parse_json(text);
  if (!manifest.ok())
    return corrupt(dir + "/" + kBackupManifest + ": " + manifest.status().message());
  DS_ASSIGN(const int64_t format, get_int(*manifest, "format"));
  if (format > kBackupFormat) {
    return unsupported("backup format " + std::to_string(format) +
                       ", this program knows formats up to " + std::to_string(kBackupFormat));
  }
  std::vector<std::string> present;
  DS_TRY(walk(fs, dir, "", present));
  std::set<std::string> unlisted(present.begin(), present.end());
  unlisted.erase(kBackupManifest);
  const Json* files = find(*manifest, "files");
  if (!files || !files->is_array()) return corrupt(dir + "/" + kBackupManifest + " lists no files");
  for (const Json& file : *files) {
    DS_ASSIGN(const std::string path, get_string(file, "path"));
    DS_ASSIGN(const std::string expected, get_string(file, "sha256"));
    if (!is_relative(path)) return corrupt("the manifest names " + path + ", outside the backup");
    const auto bytes = fs.read(dir + "/" + path);
    if (!bytes.ok()) return corrupt("backup file " + path + ": " + bytes.status().message());
    if (const std::string got = to_hex(sha256(*bytes)); got != expected) {
      return corrupt("backup file " + path + ": SHA-256 is " + got + ", expected " + expected);
    }
    unlisted.erase(path);
  }
  if (!unlisted.empty()) return corrupt("backup file " + *unlisted.begin() + " is not listed");
  return manifest;
}

Status restore_backup(FileSystem& fs, const std::string& dir, const std::string& data_dir) {
  DS_ASSIGN(const Json manifest, verify_backup(fs, dir));
  const std::string temporary = data_dir + "/" + kRestoring;
  if (fs.exists(data_dir)) {
    DS_ASSIGN(const std::vector<std::string> names, fs.list(data_dir));
    // An interrupted restore, seen by its folder and the missing store, is begun again from
    // nothing.
    const bool interrupted = fs.exists(temporary) && !fs.exists(data_dir + "/replay");
    if (!names.empty() && !interrupted) {
      return conflict(data_dir + " holds " + names.front() + ", expected an empty folder");
    }
    for (const char* part : kParts) DS_TRY(fs.remove_all(data_dir + "/" + part));
    DS_TRY(fs.remove_all(temporary));
  }
  DS_TRY(fs.make_directories(temporary));
  std::vector<std::string> copied;
  for (const Json& file : manifest["files"]) {
    copied.push_back(file["path"].get<std::string>());
    DS_TRY(copy_file(fs, dir + "/" + copied.back(), temporary + "/" + copied.back()));
  }
  DS_TRY(sync_folders(fs, temporary, copied));
  for (const char* part : kParts) {
    if (!fs.exists(temporary + "/" + part)) continue;
    DS_TRY(fs.rename(temporary + "/" + part, data_dir + "/" + part));
    DS_TRY(fs.sync_directory(data_dir));
  }
  DS_TRY(fs.remove_all(temporary));
  DS_TRY(fs.sync_directory(data_dir));
  const std::string parent = parent_of(data_dir);
  return fs.sync_directory(parent.empty() ? "." : parent);
}

}  // namespace ds
