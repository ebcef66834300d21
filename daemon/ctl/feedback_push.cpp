// SPDX-License-Identifier: Apache-2.0
// feedback push: a JSONL file in any of the known formats, told apart line by line, sent in batches
// as native records. A line that cannot be read is reported with its number and does not stop the
// others.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>

#include "ctl/commands.h"
#include "ctl/interrupt.h"
#include "ctl/output.h"
#include "ctl/progress.h"
#include "storage/import.h"
#include "storage/record.h"

namespace ds::ctl {
namespace {

constexpr size_t kBatchRecords = 64;
constexpr size_t kBatchBytes = 512u << 10;
constexpr size_t kShownRefusals = 20;

struct Refused {
  size_t line;
  std::string message;
};

struct Record {
  size_t line;  ///< of the file, from 1
  std::string text;
};

struct Push {
  std::vector<std::string> ids;
  size_t stored = 0, duplicates = 0;
  std::vector<Refused> refused;
};

Result<std::string> read_all(const std::string& file) {
  std::stringstream text;
  if (file == "-") {
    text << std::cin.rdbuf();
    return text.str();
  }
  std::ifstream stream(file, std::ios::binary);
  if (!stream) return not_found(file + ": no such readable file");
  text << stream.rdbuf();
  return text.str();
}

/// One import value (a line, or an element of a file that is one array) as records.
void import_value(const Json& value, size_t line, std::vector<Record>& records,
                  std::vector<Refused>& refused) {
  const auto imported = import_line(value);
  if (!imported.ok()) {
    refused.push_back({line, imported.status().message()});
    return;
  }
  for (const Json& record : *imported) {
    const auto checked = check_record(record);
    if (checked.ok()) {
      records.push_back({line, dump_json(record)});
    } else {
      refused.push_back({line, checked.status().message()});
    }
  }
}

std::vector<Record> import_text(const std::string& text, std::vector<Refused>& refused) {
  std::vector<Record> records;
  // Open WebUI exports one array; its elements count as lines.
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first != std::string::npos && text[first] == '[') {
    const auto whole = parse_json(text);
    if (whole.ok() && whole->is_array()) {
      for (size_t i = 0; i < whole->size(); ++i) import_value((*whole)[i], i + 1, records, refused);
      return records;
    }
  }
  size_t line = 0;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.find('\n', begin);
    if (end == std::string::npos) end = text.size();
    const std::string_view one = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++line;
    if (one.find_first_not_of(" \t\r") == one.npos) continue;
    const auto value = parse_json(one);
    if (value.ok()) {
      import_value(*value, line, records, refused);
    } else {
      refused.push_back({line, value.status().message()});
    }
  }
  return records;
}

/// Books the answers to records[begin..]; records refused because the daemon was busy are appended
/// to `records` again. Returns how many those are.
size_t take_acks(const Json& reply, std::vector<Record>& records, size_t begin, Push& push) {
  size_t again = 0;
  const Json& items = list_at(reply, "items");
  for (size_t i = 0; i < items.size(); ++i) {
    const Record* record = begin + i < records.size() ? &records[begin + i] : nullptr;
    const Json* error = dig(items[i], "error");
    if (error && record && text_at(*error, "code", "") == "busy") {
      records.push_back(Record(*record));
      ++again;
    } else if (error) {
      const std::string said = error->is_object() ? text_at(*error, "message") : dump_json(*error);
      push.refused.push_back({record ? record->line : 0, said});
    } else if (flag_at(items[i], "duplicate")) {
      ++push.duplicates;
    } else {
      ++push.stored;
      push.ids.push_back(text_at(items[i], "id", ""));
    }
  }
  return again;
}

Status send(Session& session, std::vector<Record> records, Push& push) {
  const auto total = static_cast<int64_t>(records.size());
  Progress progress("feedback push", total);
  for (size_t begin = 0; begin < records.size();) {
    std::string body;
    size_t end = begin;
    while (end < records.size() && end - begin < kBatchRecords && body.size() < kBatchBytes) {
      body += records[end++].text + "\n";
    }
    const HttpRequest request = {"POST", "/ds/v1/feedback", body, "application/x-ndjson"};
    const auto reply = session.call(request, Patience::kLong);
    bool busy = reply.status().code() == Code::kBusy;  // a refused record was not stored
    if (!reply.ok() && !busy) return reply.status();
    if (reply.ok()) {
      busy = take_acks(*reply, records, begin, push) > 0;
      begin = end;
    }
    const size_t booked = push.stored + push.duplicates + push.refused.size();
    progress.update(std::min(static_cast<int64_t>(booked), total), busy ? "busy, waiting" : "");
    if (busy && wait_or_interrupt(200)) return {Code::kCancelled, "interrupted"};
  }
  return {};
}

void report(Session& session, const Push& push) {
  if (session.json()) {
    Json refused = Json::array();
    for (const Refused& one : push.refused) {
      refused.push_back({{"line", one.line}, {"message", one.message}});
    }
    session.document("ds.FeedbackPush/1", {{"stored", push.stored},
                                           {"duplicates", push.duplicates},
                                           {"refused", refused},
                                           {"ids", push.ids}});
    return;
  }
  for (size_t i = 0; i < push.refused.size() && i < kShownRefusals; ++i) {
    std::fprintf(stderr, "line %zu: %s\n", push.refused[i].line,
                 printable(push.refused[i].message).c_str());
  }
  if (push.refused.size() > kShownRefusals) {
    std::fprintf(stderr, "... and %zu more\n", push.refused.size() - kShownRefusals);
  }
  session.print("stored " + std::to_string(push.stored) + ", duplicate " +
                std::to_string(push.duplicates) + ", refused " +
                std::to_string(push.refused.size()) + "\n");
  if (push.ids.size() == 1) session.print(push.ids[0] + "\n");
}

}  // namespace

int feedback_push(Session& session, const std::string& file) {
  const auto text = read_all(file);
  if (!text.ok()) return session.fail(text.status(), "name a JSONL file, or - for stdin");
  Push push;
  std::vector<Record> records = import_text(*text, push.refused);
  if (const Status status = send(session, std::move(records), push); !status.ok()) {
    return session.fail(status.in("after " + std::to_string(push.stored) + " stored records"));
  }
  report(session, push);
  return push.refused.empty() ? kDone : kFailed;
}

}  // namespace ds::ctl
