// SPDX-License-Identifier: Apache-2.0
// One HTTP answer made of one or more generations: submits them, streams or gathers, counts usage,
// cancels what is left when the client goes away or one of them fails.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "serve/openai_types.h"

namespace ds {

/// One generation of the answer; its position is the choice's index.
struct Ask {
  GenerateRequest generate;  ///< id, model and seed are set by answer_all()
  TraceSeed trace;
};

/// How choices look. `index` is the choice's.
struct AnswerShape {
  std::string stream_object;                ///< "chat.completion.chunk"
  std::function<Json(size_t index)> first;  ///< opening chunk of a stream; may be empty
  std::function<Json(size_t index, const Chunk&)> piece;
  std::function<Json(size_t index, const Finish&)> last;
  std::function<Json(size_t index, const Finish&)> whole;
};

struct AnswerPlan {
  AnswerHead head;  ///< without the fingerprint
  std::vector<Ask> asks;
  int answers_per_prompt = 1;  ///< the prompt counts once in usage
  bool stream = false, include_usage = false;
  AnswerShape shape;
  size_t prompt_bytes = 0;  ///< large ones are tokenized off the IO thread
  /// Fills the prompts. May run on a worker; sees nothing but the asks and constants.
  std::function<std::optional<ApiError>(std::vector<Ask>&)> prepare;
};

/// IO thread. Answers through `responder`, later.
void answer_all(Service& service, const ResponderPtr& responder, AnswerPlan plan);

}  // namespace ds
