// SPDX-License-Identifier: Apache-2.0
// Other ways to ask what an item asks, and the same question about something else. Both come from
// the text alone (no other model): rehearsed forms make the answer general, swapped forms keep it
// from spreading to its neighbours. Pure functions of (text, Rng).
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "storage/seams.h"

namespace ds {

/// ASCII letters in lower case.
std::string lower_case(std::string_view text);

/// A rewording of `question`: a lead-in, one word dropped, keywords only, an order, "Tell me
/// about", another question word, the entity first, or its attribute asked for in another sentence.
std::string reword(std::string_view question, Rng& rng);

/// The fixed rewordings that the gate scores an item on (never drawn in training).
std::vector<std::string> gate_forms(std::string_view question);

struct Swapped {
  std::string question, answer;
  std::string from, to;  ///< what was replaced by what
};

/// Replaces the entity of the question (a run of capitalised words or numbers, else a content word)
/// by a random other name of the same shape, in the question and in the answer. Names in `avoid`
/// (lower case; entities of other stored items) are never used. None when the question has no
/// content word.
std::optional<Swapped> swap_entity(std::string_view question, std::string_view answer,
                                   std::span<const std::string> avoid, Rng& rng);

/// The entities that swap_entity could replace, most specific first.
std::vector<std::string> entities(std::string_view question);

}  // namespace ds
