// SPDX-License-Identifier: Apache-2.0
#include "plugin/trust.h"

#include "storage/signature.h"

namespace ds {

Status Trust::read() {
  std::lock_guard lock(mutex_);
  allowed_.clear(), keys_.clear();
  const std::string list = folder_ + "/allowed.json";
  if (fs_.exists(list)) {
    DS_ASSIGN(const std::string text, fs_.read(list));
    Result<Json> json = parse_json(text);
    if (!json.ok()) return json.status().in(list);
    if (!json->is_object()) return corrupt(list + ": expected an object of hashes");
    for (const auto& [sha256, entry] : json->items()) allowed_[sha256] = entry;
  }
  const std::string keys = folder_ + "/keys";
  if (!fs_.exists(keys)) return {};
  DS_ASSIGN(const std::vector<std::string> names, fs_.list(keys));
  for (const std::string& name : names) {
    if (!name.ends_with(".pem")) continue;
    DS_ASSIGN(keys_[name.substr(0, name.size() - 4)], fs_.read(keys + "/" + name));
  }
  return {};
}

Result<std::string> Trust::judge(const FileContent& file) const {
  std::lock_guard lock(mutex_);
  if (allowed_.contains(file.sha256)) return std::string("allow-list");
  Result<FileContent> signature = read_plugin_file(file.path + ".sig");
  if (!signature.ok() && signature.status().code() != Code::kNotFound) return signature.status();
  if (signature.ok()) {
    for (const auto& [name, pem] : keys_) {
      DS_ASSIGN(const bool good, verify_ed25519(pem, file.bytes, signature->bytes));
      if (good) return "signature of key " + name;
    }
    return Status(Code::kPermission, file.path + ": its signature is of none of the " +
                                         std::to_string(keys_.size()) + " trusted keys");
  }
  return Status(Code::kPermission, file.path + ": SHA-256 " + file.sha256 +
                                       " is not allowed and the file has no signature");
}

Status Trust::allow(const FileContent& file, const std::string& by) {
  std::lock_guard lock(mutex_);
  Json next = Json::object();
  for (const auto& [sha256, entry] : allowed_) next[sha256] = entry;
  next[file.sha256] = {{"path", file.path}, {"by", by}};
  DS_TRY(fs_.make_directories(folder_));
  DS_TRY(write_file_atomically(fs_, folder_ + "/allowed.json", dump_json(next, 2) + "\n"));
  allowed_[file.sha256] = next[file.sha256];
  return {};
}

Json Trust::list() const {
  std::lock_guard lock(mutex_);
  Json out = {{"allowed", Json::array()}, {"keys", Json::array()}};
  for (const auto& [sha256, entry] : allowed_) {
    Json line = entry;
    line["sha256"] = sha256;
    out["allowed"].push_back(std::move(line));
  }
  for (const auto& [name, pem] : keys_) out["keys"].push_back(name);
  return out;
}

}  // namespace ds
