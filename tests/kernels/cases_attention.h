// SPDX-License-Identifier: Apache-2.0
// Attention cases: paged (serving) and packed (training), and the choice of keys for them.
#pragma once

#include <utility>

#include "tests/kernels/cases.h"

namespace ds::test {

struct AttentionShape {
  int64_t n_heads = 9, n_kv_heads = 3, d = 64;
  KvDtype dtype = KvDtype::kBF16;
  std::vector<std::pair<int64_t, int64_t>> sequences;  ///< {rows cached before, rows of this call}
  bool selected = false;                               ///< only the keys that selects() chooses
};

/// A made-up choice for the selected variants: the row's own key and about a third of the others.
bool selects(int64_t position, int64_t kv_head, int64_t key);

struct AttentionProblem {
  AttentionShape shape;
  int64_t total = 0;
  Floats q, k, v, cos, sin;  ///< of all tokens of all sequences, unrotated

  explicit AttentionProblem(const AttentionShape& shape);
  Vec expect() const;  ///< outputs of the rows of this call

  struct Part {
    size_t sequence;
    int64_t begin, end;  ///< positions
  };
  /// A cache that is filled step by step.
  struct Cache {
    const AttentionProblem& problem;
    std::vector<std::vector<int32_t>> pages;
    std::shared_ptr<char> memory_k, memory_v;
    KvView kv;

    explicit Cache(const AttentionProblem& problem);
    /// rope_append and attention of one mixed batch; outputs in the order of the parts.
    void step(const Ops& ops, const OpContext& context, const std::vector<Part>& parts,
              Floats* out);
  };
};

struct TrainShape {
  int64_t n_heads = 9, n_kv_heads = 3, d = 64, prefix = 0;
  std::vector<int64_t> rows;  ///< of each sequence; all have the same prefix
  bool selected = false;
  WeightFormat operands = WeightFormat::kF32;  ///< what products may round theirs to
  bool rounds() const { return !is_f32(operands); }
};

struct TrainProblem {
  TrainShape shape;
  int64_t rows = 0;
  Floats q, k, v, dout, prefix_k, prefix_v;

  explicit TrainProblem(const TrainShape& shape);
  Vec expect(bool backward) const;  ///< {out, lse} or {dq, dk, dv}
};

Case attention_case(const AttentionShape& shape);
Case train_attention_case(const TrainShape& shape, bool backward);
/// Shapes that meet every turn of kernels on tensor cores (tiles of 64 and 128, two pages to a
/// tile): sizes around them, head sizes that they pad, prefixes that end within a tile, more
/// sequences than a launch takes.
std::vector<Case> tensor_core_attention_cases();
/// What choose_keys and choose_train_keys make of sequences that arrive in one call and in many.
std::vector<Case> key_choice_cases();

}  // namespace ds::test
