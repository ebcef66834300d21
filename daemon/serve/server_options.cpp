// SPDX-License-Identifier: Apache-2.0
// What the settings mean for the server.
#include <algorithm>
#include <cctype>

#include "serve/server.h"

namespace ds {
namespace {

// A client may write a record with every character escaped: "\u0430" has 6 bytes for a character of 2.
// The store measures the unescaped text, so that much must get past the frame.
constexpr size_t kEscapedPerByte = 3;
constexpr size_t kEnvelopeBytes = 64u << 10;  // op, client, seq around the record
constexpr size_t kFrameSlack = 2;             // a record somewhat too large is answered, not cut off

/// Names in lower case, without the blanks around them.
Result<std::vector<std::string>> host_names(const std::string& list) {
  std::vector<std::string> names;
  for (size_t at = 0; at < list.size();) {
    const size_t end = std::min(list.find(',', at), list.size());
    std::string name;
    for (const char c : list.substr(at, end - at)) {
      name += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
    at = end + 1;
    const size_t first = name.find_first_not_of(" \t");
    if (first == std::string::npos) continue;
    name = name.substr(first, name.find_last_not_of(" \t") + 1 - first);
    const bool v6 = name.starts_with('[') && name.ends_with(']');
    if (name.find_first_of(v6 ? "/@* \t" : "/:@* \t") != std::string::npos) {
      return invalid("auth.origins: '" + name +
                     "', expected a host name without scheme and port, e.g. box.example");
    }
    names.push_back(name);
  }
  return names;
}

}  // namespace

Result<ServerOptions> server_options(const Config& config, const std::string& run_dir) {
  ServerOptions o;
  o.run_dir = run_dir;
  o.http_address = config.text("http.address");
  if (!config.text("data.endpoint").empty()) {
    o.data_endpoints = {"ipc://" + run_dir + "/data.sock", config.text("data.endpoint")};
  }
  DS_ASSIGN(o.http_hosts, host_names(config.text("auth.origins")));
  o.max_body_bytes = static_cast<size_t>(config.integer("limits.max_body"));
  o.max_record_bytes = static_cast<size_t>(config.integer("limits.max_record"));
  // Never below the default: prompts travel in the header too.
  o.max_wire_header_bytes =
      std::max(o.max_wire_header_bytes, kEscapedPerByte * o.max_record_bytes + kEnvelopeBytes);
  o.max_attachment_bytes = static_cast<size_t>(config.integer("limits.max_attachment"));
  o.max_frame_bytes =
      std::max(o.max_frame_bytes,
               kFrameSlack * std::max(o.max_wire_header_bytes, o.max_attachment_bytes));
  o.max_connections = static_cast<size_t>(config.integer("limits.connections"));
  return o;
}

}  // namespace ds
