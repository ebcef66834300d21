// SPDX-License-Identifier: Apache-2.0
// One answer of the language model, streamed: what `ask` and `run` share.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "ctl/commands.h"

namespace ds::ctl {

struct Answer {
  std::string id, version, text, finish_reason;
  int64_t prompt_tokens = 0, completion_tokens = 0;
  double first_token_s = 0, total_s = 0;
};

/// Body of /v1/chat/completions for these messages.
Json chat_request(const AskOptions& options, const Json& messages, bool stream);

/// Streams the answer; each piece of text goes to `sink` as it comes.
Result<Answer> stream_answer(Session& session, const Json& request,
                             const std::function<void(std::string_view)>& sink);

/// "ds-v41-9f3c2a1b" -> "v41".
std::string version_of_fingerprint(const std::string& fingerprint);

}  // namespace ds::ctl
