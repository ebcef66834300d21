// SPDX-License-Identifier: Apache-2.0
// Who owns which KV page. Pages are free, held by sequences, or kept as a prefix cache: full pages,
// found by the exact tokens they hold and everything before them under one execution id. Another
// version's pages are under another root and can never match. Only ids are handled here; the bytes
// live in KvPages.
//
// One thread (the engine's).
#pragma once

#include <cstdint>
#include <list>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/tokenizer.h"
#include "kernels/ops.h"

namespace ds {

inline int64_t pages_for(int64_t tokens) { return (tokens + kKvPageTokens - 1) / kKvPageTokens; }

class KvCache {
 public:
  /// Without `keep_prefixes` pages are free as soon as nobody holds them.
  KvCache(int64_t n_pages, bool keep_prefixes);

  /// Appends to `pages` the cached pages that hold the beginning of `tokens`, now held by the
  /// caller. Returns the tokens covered, a multiple of the page size.
  int64_t match(uint64_t execution_id, std::span<const TokenId> tokens,
                std::vector<int32_t>& pages);

  /// Appends `n` pages with undefined content, evicting the least recently used cached pages if
  /// needed. False: fewer are available, nothing was taken.
  bool allocate(int64_t n, std::vector<int32_t>& pages);

  /// Makes the full pages of `tokens` (all already computed) findable while the caller goes on
  /// holding them. Where an equal page is cached already, `pages` gets that one and the duplicate
  /// is freed: equal tokens under one execution id have equal bits.
  void publish(uint64_t execution_id, std::span<const TokenId> tokens, std::vector<int32_t>& pages);

  /// Gives up `pages`; published ones stay findable until evicted.
  void release(std::vector<int32_t>& pages);

  int64_t total() const { return static_cast<int64_t>(pages_.size()); }
  int64_t free() const { return static_cast<int64_t>(free_.size()); }
  int64_t cached() const {
    return static_cast<int64_t>(idle_.size());
  }  ///< findable, held by nobody
  int64_t held() const { return total() - free() - cached(); }

 private:
  /// A page as a node of the prefix tree. Node numbers are never reused, so a child whose parent
  /// was evicted is unreachable rather than misplaced.
  struct Page {
    int32_t holders = 0;
    uint64_t node = 0;  ///< 0 = not findable
    uint64_t parent = 0, hash = 0;
    std::vector<TokenId> tokens;        ///< [kKvPageTokens] when findable
    std::list<int32_t>::iterator idle;  ///< valid when findable and without holders
  };
  int32_t find(uint64_t parent, uint64_t hash, std::span<const TokenId> tokens) const;
  void hold(int32_t page);
  void give_up(int32_t page);
  void forget(int32_t page);

  const bool keep_prefixes_;
  std::vector<Page> pages_;
  std::vector<int32_t> free_;
  std::list<int32_t> idle_;  ///< least recently used first; children always before their parents
  std::unordered_multimap<uint64_t, int32_t> by_hash_;
  std::unordered_map<uint64_t, uint64_t>
      roots_;  ///< execution id -> node number of its empty prefix
  uint64_t next_node_ = 1;
};

}  // namespace ds
