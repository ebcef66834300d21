// SPDX-License-Identifier: Apache-2.0
// Tool: finds lines that are too long. The limit may change while it runs.
#include "ds/plugin.hpp"

struct line_length {
  static constexpr std::string_view name = "line-length";
  static constexpr std::string_view config_schema = R"({"type": "object", "properties": {
    "columns": {"type": "integer", "minimum": 1, "default": 100, "x-ds-live": true,
                "description": "longest line that is fine, in characters"}}})";
  static constexpr std::uint64_t caps =
      DS_CAP_CPU | DS_CAP_REENTRANT | DS_CAP_DETERMINISTIC | DS_CAP_OUT_OF_PROCESS;

  explicit line_length(ds::sdk::context c) { reconfigure(c); }
  void reconfigure(ds::sdk::context c) { columns = c.get("columns", 100); }

  template <class Emit>
  void analyse(const ds_call& call, std::string_view, std::string_view, std::string_view text,
               Emit&& emit) const {
    for (std::uint32_t line = 1; !text.empty(); ++line) {
      ds::sdk::check_cancelled(call);
      const std::string_view here = text.substr(0, text.find('\n'));
      text.remove_prefix(std::min(text.size(), here.size() + 1));
      const auto starts_character = [](char c) { return (c & 0xc0) != 0x80; };  // UTF-8
      const std::int64_t length = std::ranges::count_if(here, starts_character), limit = columns;
      if (length <= limit) continue;
      const std::string message =
          std::to_string(length) + " columns, expected at most " + std::to_string(limit);
      ds_finding f{};
      f.severity = DS_SEVERITY_WARNING;
      f.line = f.end_line = line;
      f.column = static_cast<std::uint32_t>(limit + 1);
      f.end_column = static_cast<std::uint32_t>(length);
      f.rule = ds::sdk::str("line-length");
      f.message = ds::sdk::str(message);
      f.confidence = 1;
      emit(f);
    }
  }

 private:
  std::atomic<std::int64_t> columns;
};

DS_PLUGIN("org.driftstone.example.line-length", "1.0.0", "Apache-2.0", line_length)
