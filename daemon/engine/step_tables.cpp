// SPDX-License-Identifier: Apache-2.0
#include "engine/step_tables.h"

#include <algorithm>
#include <bit>

#include "engine/kv_cache.h"

namespace ds {

size_t CallTables::room(size_t numbers) {
  constexpr size_t kAlign = 16;  // numbers: a cache line
  const size_t begin = (host_.size() + kAlign - 1) / kAlign * kAlign;
  host_.resize(begin + numbers);
  return begin;
}

size_t CallTables::append_bytes(std::span<const std::byte> part) {
  const size_t begin = room((part.size() + sizeof(int32_t) - 1) / sizeof(int32_t));
  // Not memcpy: an empty part may have no address.
  std::ranges::copy(part, std::as_writable_bytes(std::span(host_)).begin() +
                              static_cast<ptrdiff_t>(begin * sizeof(int32_t)));
  return begin;
}

Status CallTables::bring(const Ops& ops, const OpContext& context) {
  data_ = host_.data();
  if (ops.host_memory) return {};
  const size_t bytes = host_.size() * sizeof(int32_t);
  if (there_.bytes() < bytes) DS_TRY(there_.grow(ops, 2 * bytes));  // batches differ a little
  ops.upload(context, there_.data(), host_.data(), static_cast<int64_t>(bytes));
  data_ = there_.as<int32_t>();
  return {};
}

Status StepTables::set(const Ops& ops, const OpContext& context, std::span<const int32_t> ids,
                       std::span<const SequenceSpan> sequences,
                       std::span<const int32_t> slot_of_row, std::span<const int32_t> logit_rows,
                       bool rounded, std::span<const Draw> draws) {
  tables_.clear();
  rows_ = std::ssize(ids);
  batch_ = std::ssize(sequences);
  max_rows_ = max_keys_ = 0;
  for (const SequenceSpan& s : sequences) {
    max_rows_ = std::max(max_rows_, s.n_rows);
    max_keys_ = std::max(max_keys_, s.position0 + s.n_rows);
  }
  constexpr uint64_t kLeastKeys = 256;
  if (rounded)
    max_keys_ =
        static_cast<int64_t>(std::bit_ceil(std::max(kLeastKeys, static_cast<uint64_t>(max_keys_))));
  table_width_ = pages_for(max_keys_);
  ids_ = tables_.append(ids);
  lora_slots_ = tables_.append(slot_of_row);
  logit_rows_ = tables_.append(logit_rows);
  heats_.clear();
  chances_.clear();
  for (const Draw& draw : draws) {
    heats_.push_back(draw.heat);
    chances_.push_back(draw.chance);
  }
  heat_ = tables_.append(heats_);
  chance_ = tables_.append(chances_);

  const auto each = [&](const auto& add) {
    part_.clear();
    for (const SequenceSpan& s : sequences) add(s);
    return tables_.append(part_);
  };
  const auto each_row = [&](const auto& value) {
    return each([&](const SequenceSpan& s) {
      for (int64_t p = s.position0; p < s.position0 + s.n_rows; ++p)
        part_.push_back(static_cast<int32_t>(value(s, p)));
    });
  };
  positions_ = each_row([](const SequenceSpan&, int64_t p) { return p; });
  slots_ = each_row([](const SequenceSpan& s, int64_t p) {
    return int64_t{s.pages[p / kKvPageTokens]} * kKvPageTokens + p % kKvPageTokens;
  });
  lengths_ = each([&](const SequenceSpan& s) {
    part_.push_back(static_cast<int32_t>(s.position0 + s.n_rows));
  });
  table_ = each([&](const SequenceSpan& s) {
    part_.insert(part_.end(), s.pages, s.pages + pages_for(s.position0 + s.n_rows));
    part_.resize((part_.size() + static_cast<size_t>(table_width_) - 1) /
                 static_cast<size_t>(table_width_) * static_cast<size_t>(table_width_));
  });
  part_.assign(1, 0);
  for (const SequenceSpan& s : sequences) {
    DS_CHECK(s.row0 == part_.back());
    part_.push_back(part_.back() + static_cast<int32_t>(s.n_rows));
  }
  DS_CHECK(part_.back() == rows_);
  starts_ = tables_.append(part_);
  return tables_.bring(ops, context);
}

}  // namespace ds
