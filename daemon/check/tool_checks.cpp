// SPDX-License-Identifier: Apache-2.0
// Tools: analyse and invoke, and level 2: findings lie inside the text, answers are JSON.
#include <algorithm>
#include <random>

#include "check/allocations.h"
#include "check/check.h"

namespace ds::check {
namespace {

ds_str abi(std::string_view s) { return {s.data(), s.size()}; }

struct Finding {
  ds_finding at{};
  std::string rule, message, fix;
};

/// Lines of code of every length, some very long, with bytes that are no UTF-8 when `noisy`.
std::string code_text(int lines, uint64_t seed, bool noisy) {
  std::mt19937_64 rng(seed);
  std::string out;
  for (int i = 0; i < lines; ++i) {
    out += "int value_" + std::to_string(i) + " = a[" + std::to_string(rng() % 100) + "];";
    if (i % 9 == 4) out += std::string(rng() % 200, ' ') + "// \xc3\xa9t\xc3\xa9";
    if (noisy) {
      for (uint64_t k = rng() % 40; k > 0; --k) out += static_cast<char>(rng());
    }
    if (i + 1 < lines) out += '\n';
  }
  return out;
}

std::vector<Finding> analyse(Trial& t, const std::string& text, const char* language) {
  const auto table = table_of<ds_tool>(t.component);
  std::vector<Finding> out;
  const auto emit = [](void* ctx, const ds_finding* f) -> ds_code {
    const AllocationPause ours;
    const ds_finding at = full_struct(f);
    static_cast<std::vector<Finding>*>(ctx)->push_back({at, std::string(text_of(at.rule)),
                                                        std::string(text_of(at.message)),
                                                        std::string(text_of(at.fix))});
    return DS_OK;
  };
  // A copy that ends at its last byte: the text has no NUL.
  std::byte* copy = t.buffer(text.size());
  std::memcpy(copy, text.data(), text.size());
  const ds_str source{reinterpret_cast<const char*>(copy), text.size()};
  const ds_call* call = t.call(0);
  t.invoke("analyse", [&](ds_status* st) {
    return table.analyse(t.instance, call, abi(language), abi("src/value.cpp"), source, &out, emit,
                         st);
  });
  for (const Finding& f : out) {
    t.add_output(&f.at.severity, 5 * sizeof(uint32_t));
    t.add_output(f.message.data(), f.message.size());
  }
  return out;
}

/// Something for each property that the schema requires.
Json arguments_for(const ds_tool& table) {
  Json out = Json::object();
  const auto schema = parse_json(text_of(table.input_schema));
  const Json* properties =
      schema.ok() && schema->is_object() ? find(*schema, "properties") : nullptr;
  const Json* required = properties != nullptr ? find(*schema, "required") : nullptr;
  if (required == nullptr || !required->is_array() || !properties->is_object()) return out;
  for (const Json& key : *required) {
    if (!key.is_string()) continue;
    const Json* p = find(*properties, key.get<std::string>());
    const Json* type = p != nullptr && p->is_object() ? find(*p, "type") : nullptr;
    const Json* choices = p != nullptr && p->is_object() ? find(*p, "enum") : nullptr;
    const std::string name = type != nullptr && type->is_string() ? type->get<std::string>() : "";
    Json value = "text";
    if (name == "integer" || name == "number") value = 1;
    if (name == "boolean") value = true;
    if (name == "array") value = Json::array();
    if (name == "object") value = Json::object();
    if (choices != nullptr && choices->is_array() && !choices->empty()) value = choices->at(0);
    out[key.get<std::string>()] = value;
  }
  return out;
}

std::string invoke(Trial& t, const std::string& arguments) {
  const auto table = table_of<ds_tool>(t.component);
  std::string out;
  ds_sink sink{};
  sink.ctx = &out;
  sink.write = [](void* ctx, const void* bytes, uint64_t n) -> ds_code {
    const AllocationPause ours;
    static_cast<std::string*>(ctx)->append(static_cast<const char*>(bytes), n);
    return DS_OK;
  };
  const ds_sink* given = t.give("ds_sink", sink);
  const ds_call* call = t.call(0);
  t.invoke("invoke", [&](ds_status* st) {
    return table.invoke(t.instance, call, abi(arguments), given, st);
  });
  t.add_output(out.data(), out.size());
  return out;
}

void analyse_one(Trial& t) {
  const int lines = 40 * t.options.scale;
  analyse(t, t.options.empty ? "" : code_text(lines, t.options.content, t.options.content % 2 == 0),
          "c++");
}
void invoke_one(Trial& t) {
  invoke(t, t.options.empty ? "" : dump_json(arguments_for(table_of<ds_tool>(t.component))));
}

std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> out;
  for (size_t at = 0;;) {
    const size_t end = text.find('\n', at);
    out.push_back(text.substr(at, end == text.npos ? text.npos : end - at));
    if (end == text.npos) return out;
    at = end + 1;
  }
}

std::string judge(const Finding& f, const std::vector<std::string_view>& lines) {
  const ds_finding& at = f.at;
  if (at.severity < DS_SEVERITY_ERROR || at.severity > DS_SEVERITY_NOTE)
    return "severity " + std::to_string(at.severity) + ", expected 1 to 3";
  if (f.message.empty()) return "a finding without a message";
  if (!(at.confidence >= 0 && at.confidence <= 1))
    return "confidence " + std::to_string(at.confidence) + ", expected 0 to 1";
  if (at.line > lines.size() || at.end_line > lines.size())
    return "line " + std::to_string(std::max(at.line, at.end_line)) + " of a text with " +
           std::to_string(lines.size());
  if (at.end_line != 0 && at.end_line < at.line) return "a finding ends before it begins";
  if (at.line != 0 && at.column > lines[at.line - 1].size() + 1)
    return "column " + std::to_string(at.column) + " of a line with " +
           std::to_string(lines[at.line - 1].size()) + " bytes";
  if (!parse_json(dump_json(Json(f.message))).ok()) return "a message that is no text";
  return "";
}

Verdict findings(Bench& bench) {
  if (table_of<ds_tool>(bench.component).analyse == nullptr) return skipped("no analyse");
  size_t seen = 0;
  for (const char* language : {"c++", "python", "a language that does not exist"}) {
    for (const int lines : {1, 40, 300}) {
      const Instance instance(bench);
      Trial t(bench.component, instance.get(), {});
      const std::string text =
          code_text(lines, bench.settings.seed + static_cast<uint64_t>(lines), lines == 300);
      for (const Finding& f : analyse(t, text, language)) {
        ++seen;
        const std::string wrong = judge(f, lines_of(text));
        if (!wrong.empty()) return failed(wrong);
      }
    }
  }
  return pass(std::to_string(seen) + " findings");
}

Verdict answers(Bench& bench) {
  const auto table = table_of<ds_tool>(bench.component);
  if (table.invoke == nullptr) return skipped("no invoke");
  const std::string_view schema = text_of(table.input_schema);
  if (!schema.empty() && !parse_json(schema).ok()) return failed("input_schema is not JSON");
  const Instance instance(bench);
  const auto answer = [&](const std::string& arguments, ds_code& code) {
    Trial t(bench.component, instance.get(), {});
    const std::string out = invoke(t, arguments);
    code = t.code;
    return out;
  };
  ds_code code = DS_OK;
  const std::string good = answer(dump_json(arguments_for(table)), code);
  if (code == DS_OK && !parse_json(good).ok()) return failed("the answer is not JSON");
  for (const char* bad : {"", "{", "[1,", "\"\\ud800\"", "{\"a\":"}) {
    (void)answer(bad, code);
    if (code == DS_OK) return failed(std::string("it took the broken arguments ") + bad);
  }
  return pass();
}

}  // namespace

std::vector<Operation> tool_operations() {
  return {{"analyse", [](const ds_component& c) { return table_of<ds_tool>(c).analyse != nullptr; },
           analyse_one},
          {"invoke", [](const ds_component& c) { return table_of<ds_tool>(c).invoke != nullptr; },
           invoke_one}};
}

std::vector<Check> tool_checks() {
  return {{"numerics.findings", 2, DS_KIND_TOOL, {}, findings},
          {"numerics.answers", 2, DS_KIND_TOOL, {}, answers}};
}

}  // namespace ds::check
