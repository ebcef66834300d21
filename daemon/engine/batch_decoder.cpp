// SPDX-License-Identifier: Apache-2.0
#include "engine/batch_decoder.h"

#include <algorithm>

namespace ds {

BatchDecoder::BatchDecoder(const ModelConfig& config, const Compute& compute, KvDtype dtype)
    : config_(config),
      compute_(compute),
      dtype_(dtype),
      forward_(config, compute, kRows),
      logits_(static_cast<size_t>(kRows * config.vocab)) {}

Status BatchDecoder::score(const BaseWeights& base, const LoraDelta* delta,
                           std::span<const std::vector<TokenId>> sequences,
                           std::span<const int64_t> first_target,
                           const std::function<void(size_t, int64_t, const float*)>& row) {
  for (size_t s = 0; s < sequences.size(); ++s) {
    const auto n = static_cast<int64_t>(sequences[s].size());
    const int64_t n_pages = (n + kKvPageTokens - 1) / kKvPageTokens;
    KvPages pages(config_, compute_, dtype_, n_pages);
    std::vector<int32_t> table(static_cast<size_t>(n_pages));
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
    for (int64_t at = 0; at < n - 1; at += kRows) {
      const int64_t rows = std::min(kRows, n - 1 - at);
      const SequenceSpan span{0, rows, at, table.data()};
      std::vector<int32_t> wanted, slots(static_cast<size_t>(rows), delta != nullptr ? 0 : -1);
      for (int64_t r = std::max<int64_t>(0, first_target[s] - 1 - at); r < rows; ++r) {
        wanted.push_back(static_cast<int32_t>(r));
      }
      StepBatch batch;
      batch.ids =
          std::span(sequences[s]).subspan(static_cast<size_t>(at), static_cast<size_t>(rows));
      batch.sequences = {&span, 1};
      batch.slot_of_row = slots;
      if (delta != nullptr) batch.deltas = {&delta, 1};
      batch.logit_rows = wanted;
      DS_TRY(forward_.run(base, batch, pages, logits_.data(), nullptr));
      for (size_t i = 0; i < wanted.size(); ++i) {
        row(s, at + wanted[i] + 1, logits_.data() + static_cast<int64_t>(i) * config_.vocab);
      }
    }
  }
  return {};
}

/// One sequence being decoded in generate().
struct BatchDecoder::Live {
  size_t index = 0;          // of the prompt
  std::vector<TokenId> ids;  // prompt and what followed
  int64_t cached = 0;        // ids already in the pages
  std::vector<int32_t> table;
  bool ready = false;  // all of ids is in the pages and the last token chose `next`
  TokenId next = -1;
};

/// Feeds as many pending tokens as fit in one pass, in the order of `live`.
Status BatchDecoder::step(const BaseWeights& base, const LoraDelta* delta, KvPages& pages,
                          std::span<Live> live, const Sampling& sampling,
                          const LinearWatch* watch) {
  std::vector<TokenId> ids;
  std::vector<SequenceSpan> spans;
  std::vector<int32_t> wanted;
  std::vector<Live*> chosen;
  for (Live& s : live) {
    s.ready = false;
    const auto pending = static_cast<int64_t>(s.ids.size()) - s.cached;
    const int64_t rows = std::min(pending, kRows - static_cast<int64_t>(ids.size()));
    if (rows <= 0) continue;
    spans.push_back({static_cast<int64_t>(ids.size()), rows, s.cached, s.table.data()});
    ids.insert(ids.end(), s.ids.begin() + s.cached, s.ids.begin() + s.cached + rows);
    s.cached += rows;
    if (rows < pending) continue;
    wanted.push_back(static_cast<int32_t>(ids.size()) - 1);
    chosen.push_back(&s);
  }
  const std::vector<int32_t> slots(ids.size(), delta != nullptr ? 0 : -1);
  StepBatch batch;
  batch.ids = ids;
  batch.sequences = spans;
  batch.slot_of_row = slots;
  if (delta != nullptr) batch.deltas = {&delta, 1};
  batch.logit_rows = wanted;
  batch.watch = watch;
  DS_TRY(forward_.run(base, batch, pages, logits_.data(), nullptr));
  for (size_t i = 0; i < chosen.size(); ++i) {
    const auto vocab = static_cast<size_t>(config_.vocab);
    const uint64_t position = uint64_t{chosen[i]->index} << 32 | chosen[i]->ids.size();
    DS_ASSIGN(chosen[i]->next,
              sample_token({logits_.data() + i * vocab, vocab}, sampling, {}, position, scratch_));
    chosen[i]->ready = true;
  }
  return {};
}

Result<std::vector<std::vector<TokenId>>> BatchDecoder::generate(
    const BaseWeights& base, const LoraDelta* delta, std::span<const std::vector<TokenId>> prompts,
    int64_t max_tokens, TokenId stop, const Sampling& sampling, const LinearWatch* watch) {
  std::vector<std::vector<TokenId>> answers(prompts.size());
  std::vector<Live> live;
  int32_t next_page = 0;
  for (size_t i = 0; i < prompts.size(); ++i) {
    Live s;
    s.index = i;
    s.ids = prompts[i];
    const int64_t tokens = static_cast<int64_t>(prompts[i].size()) + max_tokens;
    for (int64_t p = 0; p < (tokens + kKvPageTokens - 1) / kKvPageTokens; ++p)
      s.table.push_back(next_page++);
    if (max_tokens > 0) live.push_back(std::move(s));
  }
  KvPages pages(config_, compute_, dtype_, std::max(next_page, 1));
  while (!live.empty()) {
    DS_TRY(step(base, delta, pages, live, sampling, watch));
    std::erase_if(live, [&](Live& s) {
      if (!s.ready) return false;
      if (s.next == stop) return true;
      answers[s.index].push_back(s.next);
      s.ids.push_back(s.next);
      return static_cast<int64_t>(answers[s.index].size()) >= max_tokens;
    });
  }
  return answers;
}

}  // namespace ds
