// SPDX-License-Identifier: Apache-2.0
// What the ops of one serving step look up: token ids, positions, places in the KV pages, who
// belongs to which sequence. Put together on the host and brought to the backend in one copy.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/buffer.h"
#include "kernels/ops.h"

namespace ds {

/// One sequence's part of a mixed batch: rows [row0, row0 + n_rows) are its tokens at positions
/// [position0, position0 + n_rows); keys 0 .. position are visible to each (causal).
struct SequenceSpan {
  int64_t row0 = 0, n_rows = 0, position0 = 0;
  const int32_t* pages = nullptr;  ///< page ids covering positions 0 .. position0 + n_rows - 1
};

/// How Ops::sample takes a token from a row of logits.
struct Draw {
  float heat = 0;  ///< 1 / temperature; 0: the largest
  double chance = 0;
};

/// Several arrays of numbers brought to a backend in one copy, and room there for results.
class CallTables {
 public:
  void clear() { host_.clear(); }
  // Each returns what at() knows it by.
  size_t append(std::span<const int32_t> part) { return append_bytes(std::as_bytes(part)); }
  size_t append(std::span<const float> part) { return append_bytes(std::as_bytes(part)); }
  size_t append(std::span<const double> part) { return append_bytes(std::as_bytes(part)); }
  size_t room(size_t numbers);
  /// After the last of these. What is there now may still be in use by calls on the context's
  /// stream.
  Status bring(const Ops& ops, const OpContext& context);
  /// In the memory of the backend, once it is brought.
  template <typename T = const int32_t>
  T* at(size_t part) const {
    static_assert(sizeof(T) % sizeof(int32_t) == 0);
    return reinterpret_cast<T*>(data_ + part);
  }
  /// Results to the host; there after finish().
  template <typename T>
  void fetch(const Ops& ops, const OpContext& context, size_t part, std::span<T> to) const {
    ops.download(context, to.data(), at<T>(part), static_cast<int64_t>(to.size_bytes()));
  }

 private:
  size_t append_bytes(std::span<const std::byte> part);

  std::vector<int32_t> host_;
  Buffer there_;
  int32_t* data_ = nullptr;
};

class StepTables {
 public:
  /// `sequences` in the order of the rows, which they cover. `rounded`: max_keys is rounded up to a
  /// power of two, at least 256, so that steps one after the other have the same sizes.
  Status set(const Ops& ops, const OpContext& context, std::span<const int32_t> ids,
             std::span<const SequenceSpan> sequences, std::span<const int32_t> slot_of_row,
             std::span<const int32_t> logit_rows, bool rounded = false,
             std::span<const Draw> draws = {});
  const void* address() const { return at(0); }  ///< of all of them

  int64_t rows() const { return rows_; }
  int64_t batch() const { return batch_; }
  int64_t max_rows() const { return max_rows_; }  ///< of one sequence
  int64_t max_keys() const { return max_keys_; }
  int64_t table_width() const { return table_width_; }

  // In the memory of the backend, [rows] where nothing else is said.
  const int32_t* ids() const { return at(ids_); }
  const int32_t* positions() const { return at(positions_); }
  const int32_t* slots() const { return at(slots_); }  ///< page * 32 + position % 32
  const int32_t* lora_slots() const { return at(lora_slots_); }
  const int32_t* starts() const { return at(starts_); }    ///< [batch + 1]
  const int32_t* lengths() const { return at(lengths_); }  ///< [batch]
  const int32_t* table() const { return at(table_); }      ///< [batch, table_width]
  const int32_t* logit_rows() const { return at(logit_rows_); }
  const float* heat() const { return tables_.at<const float>(heat_); }        ///< [draws]
  const double* chance() const { return tables_.at<const double>(chance_); }  ///< [draws]

 private:
  const int32_t* at(size_t part) const { return tables_.at(part); }

  int64_t rows_ = 0, batch_ = 0, max_rows_ = 0, max_keys_ = 0, table_width_ = 0;
  size_t ids_ = 0, positions_ = 0, slots_ = 0, lora_slots_ = 0, starts_ = 0, lengths_ = 0,
         table_ = 0, logit_rows_ = 0, heat_ = 0, chance_ = 0;
  std::vector<int32_t> part_;
  std::vector<float> heats_;
  std::vector<double> chances_;
  CallTables tables_;
};

}  // namespace ds
