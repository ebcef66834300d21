// SPDX-License-Identifier: Apache-2.0
// Requests, errors and the bookkeeping of one answer.
#include "serve/http.h"

#include <algorithm>

namespace ds {

const std::string* HttpRequest::header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return &value;
  }
  return nullptr;
}

std::string HttpRequest::query_value(std::string_view name, std::string_view fallback) const {
  for (const auto& [key, value] : query) {
    if (key == name) return value;
  }
  return std::string(fallback);
}

std::string shortened(const std::string& message) {
  constexpr size_t kHead = 700, kTail = 300;  // bytes; what was expected stands at the end
  if (message.size() <= kHead + kTail) return message;
  const auto inside_character = [&](size_t at) { return (message[at] & 0xc0) == 0x80; };
  size_t head = kHead, tail = message.size() - kTail;
  while (head > 0 && inside_character(head)) --head;
  while (tail < message.size() && inside_character(tail)) ++tail;
  return message.substr(0, head) + " [" + std::to_string(tail - head) + " bytes] " +
         message.substr(tail);
}

Json error_json(const ApiError& error) {
  const auto text_or_null = [](const std::string& text) {
    return text.empty() ? Json() : Json(text);
  };
  return {{"error",
           {{"message", shortened(error.message)},
            {"type", error.type},
            {"param", text_or_null(error.param)},
            {"code", text_or_null(error.code)}}}};
}

ApiError api_error(const Status& status) {
  ApiError error;
  error.message = status.message();
  error.code = code_name(status.code());
  switch (status.code()) {
    case Code::kInvalid:
      break;
    case Code::kNotFound:
      error.status = 404;
      break;
    case Code::kPermission:
      error.status = 403, error.type = "permission_error";
      break;
    case Code::kConflict:
      error.status = 409;
      break;
    case Code::kBusy:
      error.status = 429, error.type = "rate_limit_error", error.retry_after_s = 1;
      break;
    case Code::kUnavailable:
    case Code::kResource:
    case Code::kDeviceLost:
      error.status = 503, error.type = "server_error", error.retry_after_s = 1;
      break;
    case Code::kUnsupported:
      error.status = 501, error.type = "not_implemented";
      break;
    case Code::kDeadline:
      error.status = 504, error.type = "server_error";
      break;
    case Code::kCancelled:
      error.status = 503, error.type = "server_error";
      break;
    default:
      error.status = 500, error.type = "server_error";
      break;
  }
  return error;
}

void Responder::add_header(std::string name, std::string value) {
  std::erase_if(value, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; });
  headers_.emplace_back(std::move(name), std::move(value));
}

void Responder::finish() {
  open_ = false;
  on_close_ = nullptr;
}

void Responder::reply(HttpReply reply) {
  if (!open_ || started_) return;
  started_ = true;
  status_ = reply.status;
  reply.headers.insert(reply.headers.end(), headers_.begin(), headers_.end());
  finish();
  sink_.reply(std::move(reply));
}

void Responder::json(const Json& body, int status) {
  HttpReply answer;
  answer.status = status;
  answer.body = dump_json(body);
  answer.body += '\n';
  reply(std::move(answer));
}

void Responder::error(const ApiError& error) {
  if (error.retry_after_s > 0) add_header("retry-after", std::to_string(error.retry_after_s));
  // openai-python repeats 409 by itself; ours are permanent.
  if (error.status == 409) add_header("x-should-retry", "false");
  json(error_json(error), error.status);
}

void Responder::result(const Result<Json>& result) {
  if (result.ok()) return json(result.value());
  error(api_error(result.status()));
}

void Responder::begin_stream() {
  if (!open_ || started_) return;
  started_ = true;
  status_ = 200;
  HttpReply head;
  head.type = "text/event-stream";
  head.headers = headers_;
  head.headers.emplace_back("cache-control", "no-cache");
  sink_.begin(std::move(head));
}

void Responder::event(const Json& data) { write("data: " + dump_json(data) + "\n\n"); }

void Responder::write(std::string bytes) {
  if (open_ && started_) sink_.write(std::move(bytes));
}

void Responder::end() {
  if (!open_ || !started_) return;
  finish();
  sink_.end();
}

void Responder::on_close(std::function<void()> closed) {
  if (gone_) return closed();
  if (open_) on_close_ = std::move(closed);
}

void Responder::client_gone() {
  if (!open_) return;
  open_ = false;
  gone_ = true;
  if (auto closed = std::exchange(on_close_, nullptr)) closed();
}

}  // namespace ds
