// SPDX-License-Identifier: Apache-2.0
// Which waiting items enter a round: fair shares between sources, one copy of what is said twice,
// the newest of answers that contradict each other. Pure functions; the acknowledgement never
// depends on them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "storage/replay_store.h"

namespace ds {

/// Sources from which on a round is shared out between them.
constexpr size_t kSourcesForQuota = 8;

/// The first `limit` items in order. From kSourcesForQuota different sources on, sources take
/// turns, in the order of their oldest item, so that one busy source cannot keep the others out of
/// a round.
std::vector<FeedbackItem> fair_share(std::vector<FeedbackItem> items, size_t limit);

/// Share of common word 3-grams of the normalised texts (Jaccard), 0..1; shorter texts are compared
/// whole.
double likeness(const std::string& a, const std::string& b);
constexpr double kNearDuplicate = 0.85;

struct Rejected {
  FeedbackItem item;
  std::string reason;  ///< names the other item
};

struct Admission {
  std::vector<FeedbackItem> admitted;
  std::vector<Rejected> quarantined;
};

/// `items` by offset. An answer gives way to a later correction of the same conversation, since
/// people correct their corrections, and to a later copy of itself; of two nearly equal raw texts
/// the older one stays. Different demonstrations and preferences of one conversation do not
/// contradict.
Admission admit(std::vector<FeedbackItem> items);

/// The id of one of `others` that `item` gives way to; empty = none.
std::string superseded_by(const FeedbackItem& item, const std::vector<FeedbackItem>& others);

/// Whether an item was quarantined because of this one alone.
bool gave_way_to(const FeedbackItem& item, const std::string& id);
/// The reason of an answer in quarantine.
std::string superseded_reason(const std::string& by);

/// The items of `earlier` that give way to none of `earlier` and `fresh`: what may be rehearsed.
std::vector<FeedbackItem> not_superseded(const std::vector<FeedbackItem>& earlier,
                                         const std::vector<FeedbackItem>& fresh);

}  // namespace ds
