// SPDX-License-Identifier: Apache-2.0
// From stored feedback to what a round trains on, and when a round opens.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "config.h"
#include "learn/round_trainer.h"
#include "storage/replay_store.h"

namespace ds {

/// The lesson in a record of the language model's kinds (demonstration, correction, preference,
/// text). Corrections and preferences that cite a response read its conversation from "joined". An
/// error says why the item cannot be trained ("images are not readable yet").
Result<Lesson> lesson_of(const FeedbackItem& item);

struct RoundRule {
  int64_t min_items = 1, settle_ms = 2000, max_wait_ms = 30000;
};
/// As it is set now: learn.min_items, learn.settle, learn.max_wait.
RoundRule round_rule(const Config& config);

/// Milliseconds until a round may open: 0 = now; negative = not without new items. `oldest_ms` and
/// `newest_ms` are the receive times of the waiting items.
int64_t round_opens_in(const RoundRule& rule, int64_t waiting, int64_t oldest_ms, int64_t newest_ms,
                       int64_t now_ms);

/// After the disk has failed no round opens by itself for learn.max_wait, at least a second: what
/// cannot be stored is not trained over and over.
class BackOff {
 public:
  void begin(const Config& config, const Clock& clock);
  int64_t left_ms(const Clock& clock) const;  ///< 0 = over

 private:
  int64_t until_ns_ = 0;
};

/// Letters and digits in lower case, other bytes from 0x80 as they are: what "the same text" means.
std::string normalised(const std::string& text);

/// Whether a raw text belongs to the hold-out of its domain: one in 20 clusters of equal normalised
/// text, once the domain has at least 100.
bool held_out(const std::string& text, int64_t clusters_in_domain);

}  // namespace ds
