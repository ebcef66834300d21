// SPDX-License-Identifier: Apache-2.0
#include "ctl/answer.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <iostream>
#include <iterator>

#include "ctl/output.h"

namespace ds::ctl {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void take_chunk(const Json& chunk, Answer& answer) {
  if (answer.id.empty()) answer.id = text_at(chunk, "id", "");
  if (answer.version.empty()) {
    answer.version = version_of_fingerprint(text_at(chunk, "system_fingerprint", ""));
  }
  answer.prompt_tokens = integer_at(chunk, "usage.prompt_tokens", answer.prompt_tokens);
  answer.completion_tokens = integer_at(chunk, "usage.completion_tokens", answer.completion_tokens);
}

std::string read_stdin() {
  return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
}

void print_stats(const Answer& answer) {
  const double decode_s = answer.total_s - answer.first_token_s;
  const double rate = answer.completion_tokens > 1 && decode_s > 0
                          ? static_cast<double>(answer.completion_tokens - 1) / decode_s
                          : 0;
  std::fprintf(stderr, "%s tokens in %s, %s tokens/s, first after %s, prompt %s, %s, %s\n",
               count_text(answer.completion_tokens).c_str(), duration_text(answer.total_s).c_str(),
               number_text(rate).c_str(), duration_text(answer.first_token_s).c_str(),
               count_text(answer.prompt_tokens).c_str(), answer.version.c_str(), answer.id.c_str());
}

int ask_as_document(Session& session, const Json& request) {
  const auto reply = session.post("/v1/chat/completions", request, Patience::kLong);
  if (!reply.ok()) return session.fail(reply.status());
  const Json& choices = list_at(*reply, "choices");
  const Json choice = choices.empty() ? Json::object() : choices[0];
  const Json* text = dig(choice, "message.content");
  const Json* usage = dig(*reply, "usage");
  session.document("ds.Answer/1",
                   {{"id", text_at(*reply, "id", "")},
                    {"version", version_of_fingerprint(text_at(*reply, "system_fingerprint", ""))},
                    {"text", text ? *text : Json("")},
                    {"finish_reason", text_at(choice, "finish_reason", "")},
                    {"usage", usage ? *usage : Json::object()}});
  return kDone;
}

}  // namespace

std::string version_of_fingerprint(const std::string& fingerprint) {
  const size_t end = fingerprint.rfind('-');
  if (!fingerprint.starts_with("ds-") || end <= 3 || end == fingerprint.npos) return fingerprint;
  return fingerprint.substr(3, end - 3);
}

Json chat_request(const AskOptions& options, const Json& messages, bool stream) {
  Json request = {{"model", options.model.empty() ? "default" : options.model},
                  {"messages", messages}};
  if (options.max_tokens) request["max_tokens"] = *options.max_tokens;
  request["temperature"] = options.temperature.value_or(0);
  if (options.seed) request["seed"] = *options.seed;
  if (stream) {
    request["stream"] = true;
    request["stream_options"] = {{"include_usage", true}};
  }
  return request;
}

Result<Answer> stream_answer(Session& session, const Json& request,
                             const std::function<void(std::string_view)>& sink) {
  const auto start = std::chrono::steady_clock::now();
  Answer answer;
  Status failed;
  const HttpRequest http = {"POST", "/v1/chat/completions", dump_json(request)};
  const Status status = session.follow(
      http, session.timeout_ms(Patience::kLong), [&](std::string_view, const Json& chunk) {
        if (dig(chunk, "error")) {
          failed = io_error(text_at(chunk, "error.message"));
          return false;
        }
        take_chunk(chunk, answer);
        const Json& choices = list_at(chunk, "choices");
        if (choices.empty()) return true;
        answer.finish_reason = text_at(choices[0], "finish_reason", answer.finish_reason);
        const Json* piece = dig(choices[0], "delta.content");
        if (!piece || !piece->is_string() || piece->get_ref<const std::string&>().empty())
          return true;
        if (answer.text.empty()) answer.first_token_s = seconds_since(start);
        answer.text += piece->get_ref<const std::string&>();
        sink(piece->get_ref<const std::string&>());
        return true;
      });
  if (!status.ok()) return status;
  if (!failed.ok()) return failed;
  if (answer.finish_reason.empty()) return unavailable("the answer ended before it was complete");
  answer.total_s = seconds_since(start);
  return answer;
}

int ask(Session& session, const AskOptions& options) {
  const std::string prompt = options.prompt == "-" ? read_stdin() : options.prompt;
  Json messages = Json::array();
  if (!options.system.empty())
    messages.push_back({{"role", "system"}, {"content", options.system}});
  messages.push_back({{"role", "user"}, {"content", prompt}});
  if (session.json()) return ask_as_document(session, chat_request(options, messages, false));

  const bool terminal = isatty(STDOUT_FILENO);
  const auto answer =
      stream_answer(session, chat_request(options, messages, true), [&](std::string_view piece) {
        session.print(terminal ? printable(piece, true) : std::string(piece));
      });
  if (!answer.ok()) {
    if (terminal) session.print("\n");
    return session.fail(answer.status());
  }
  if (!answer->text.ends_with('\n')) session.print("\n");
  if (options.stats) print_stats(*answer);
  return kDone;
}

int tokenize(Session& session, const std::string& text, bool count) {
  const auto reply = session.post("/ds/v1/tokenize", {{"text", text == "-" ? read_stdin() : text}});
  if (!reply.ok()) return session.fail(reply.status());
  const Json& ids = list_at(*reply, "ids");
  if (session.json()) {
    session.document("ds.Tokens/1", {{"ids", ids}, {"count", ids.size()}});
    return kDone;
  }
  if (count) {
    session.print(std::to_string(ids.size()) + "\n");
    return kDone;
  }
  std::string line;
  for (const Json& id : ids) line += (line.empty() ? "" : " ") + dump_json(id);
  session.print(line + "\n");
  return kDone;
}

}  // namespace ds::ctl
