// SPDX-License-Identifier: Apache-2.0
// Generation as serve/ needs it: sampling parameters from JSON (OpenAI's names and ranges, for HTTP
// and for the wire), and a submit whose callbacks arrive on the IO thread, after the trace is
// stored.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "serve/service.h"

namespace ds {

/// Reads an object's known fields, one by one, and remembers which were read.
class Fields {
 public:
  explicit Fields(const Json& object) : object_(object) {}
  /// The member, or null when absent or null. Counts as known.
  const Json* get(const std::string& key);
  /// Fields that nobody asked for, joined by ", ", at most 20: for x-ds-ignored.
  std::string ignored() const;

  // Each of these refuses a wrong type or a value out of range, naming the field. First error
  // stays.
  int64_t integer(const std::string& key, int64_t fallback, int64_t least, int64_t most);
  double number(const std::string& key, double fallback, double least, double most);
  bool flag(const std::string& key, bool fallback);
  std::string text(const std::string& key, const std::string& fallback);
  void fail(const std::string& key, const std::string& message, const std::string& code = "");
  const std::optional<ApiError>& error() const { return error_; }

 private:
  const Json& object_;
  std::set<std::string> known_;
  std::optional<ApiError> error_;
};

/// model, max_tokens, temperature, top_p, top_k, min_p, penalties, seed, stop, logit_bias.
void read_sampling(Fields& fields, int64_t vocab_size, GenerateRequest& request);
/// messages: [{role, content}] with content a string or a list of text parts.
std::vector<ChatMessage> read_messages(Fields& fields);

/// Renders the conversation into `request` and sets its stop ids; refused without a template.
std::optional<ApiError> set_chat_prompt(const Service& service,
                                        const std::vector<ChatMessage>& messages,
                                        GenerateRequest& request);

/// What is stored so that feedback can cite the answer: the prompt as given.
struct TraceSeed {
  Json messages;       ///< the messages, or {"prompt": "..."}
  std::string source;  ///< who asked
};

/// Submits; `on_chunk` (may be null) and `on_finish` run on the IO thread. The trace of a completed
/// answer is in the store before `on_finish` runs.
Status submit_generation(Service& service, GenerateRequest request, TraceSeed trace,
                         OnChunk on_chunk, OnFinish on_finish);

/// The same from a Status of the engine, with OpenAI's code for an unknown model and the known
/// ones.
ApiError generation_error(const Service& service, const Status& status);

/// The FP32 value as the double with the shortest decimal that reads back as it.
double shortest(float value);

}  // namespace ds
