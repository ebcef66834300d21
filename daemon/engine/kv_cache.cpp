// SPDX-License-Identifier: Apache-2.0
#include "engine/kv_cache.h"

#include <algorithm>

#include "ds/status.h"
#include "storage/seams.h"

namespace ds {
namespace {

uint64_t hash_of(uint64_t parent, std::span<const TokenId> tokens) {
  uint64_t hash = parent;
  for (const TokenId id : tokens) hash = Rng::mix(hash, static_cast<uint64_t>(id));
  return hash;
}

std::span<const TokenId> block_of(std::span<const TokenId> tokens, int64_t index) {
  return tokens.subspan(static_cast<size_t>(index * kKvPageTokens), kKvPageTokens);
}

}  // namespace

KvCache::KvCache(int64_t n_pages, bool keep_prefixes)
    : keep_prefixes_(keep_prefixes), pages_(static_cast<size_t>(n_pages)) {
  free_.reserve(pages_.size());
  for (int64_t i = n_pages - 1; i >= 0; --i) free_.push_back(static_cast<int32_t>(i));
}

int64_t KvCache::match(uint64_t execution_id, std::span<const TokenId> tokens,
                       std::vector<int32_t>& pages) {
  const auto root = roots_.find(execution_id);
  if (root == roots_.end()) return 0;
  uint64_t parent = root->second;
  const int64_t full = static_cast<int64_t>(tokens.size()) / kKvPageTokens;
  int64_t matched = 0;
  for (; matched < full; ++matched) {
    const auto block = block_of(tokens, matched);
    const int32_t page = find(parent, hash_of(parent, block), block);
    if (page < 0) break;
    hold(page);
    pages.push_back(page);
    parent = pages_[static_cast<size_t>(page)].node;
  }
  return matched * kKvPageTokens;
}

bool KvCache::allocate(int64_t n, std::vector<int32_t>& pages) {
  if (free() + cached() < n) return false;
  for (int64_t i = 0; i < n; ++i) {
    if (free_.empty()) {
      const int32_t oldest = idle_.front();
      idle_.pop_front();
      forget(oldest);
      free_.push_back(oldest);
    }
    const int32_t page = free_.back();
    free_.pop_back();
    pages_[static_cast<size_t>(page)].holders = 1;
    pages.push_back(page);
  }
  return true;
}

void KvCache::publish(uint64_t execution_id, std::span<const TokenId> tokens,
                      std::vector<int32_t>& pages) {
  if (!keep_prefixes_) return;
  const int64_t full = static_cast<int64_t>(tokens.size()) / kKvPageTokens;
  if (full == 0) return;
  uint64_t& root = roots_[execution_id];
  if (root == 0) root = next_node_++;
  uint64_t parent = root;
  for (int64_t i = 0; i < full; ++i) {
    const auto block = block_of(tokens, i);
    int32_t& mine = pages[static_cast<size_t>(i)];
    Page& page = pages_[static_cast<size_t>(mine)];
    if (page.node != 0 && page.parent == parent) {  // published or matched before
      parent = page.node;
      continue;
    }
    const uint64_t hash = hash_of(parent, block);
    const int32_t twin = find(parent, hash, block);
    if (twin >= 0) {
      hold(twin);
      give_up(mine);
      mine = twin;
      parent = pages_[static_cast<size_t>(twin)].node;
      continue;
    }
    DS_CHECK(page.node == 0);  // a holder of a page holds all its parents: they cannot have changed
    page.node = next_node_++;
    page.parent = parent;
    page.hash = hash;
    page.tokens.assign(block.begin(), block.end());
    by_hash_.emplace(hash, mine);
    parent = page.node;
  }
}

void KvCache::release(std::vector<int32_t>& pages) {
  // Deepest first, so that a parent is always more recently used than its children.
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) give_up(*page);
  pages.clear();
}

int32_t KvCache::find(uint64_t parent, uint64_t hash, std::span<const TokenId> tokens) const {
  const auto [begin, end] = by_hash_.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    const Page& page = pages_[static_cast<size_t>(it->second)];
    if (page.parent == parent && std::ranges::equal(page.tokens, tokens)) return it->second;
  }
  return -1;
}

void KvCache::hold(int32_t id) {
  Page& page = pages_[static_cast<size_t>(id)];
  if (page.holders++ == 0) idle_.erase(page.idle);
}

void KvCache::give_up(int32_t id) {
  Page& page = pages_[static_cast<size_t>(id)];
  DS_CHECK(page.holders > 0);
  if (--page.holders > 0) return;
  if (page.node == 0) {
    free_.push_back(id);
  } else {
    page.idle = idle_.insert(idle_.end(), id);
  }
}

void KvCache::forget(int32_t id) {
  Page& page = pages_[static_cast<size_t>(id)];
  const auto [begin, end] = by_hash_.equal_range(page.hash);
  const auto it = std::find_if(begin, end, [id](const auto& entry) { return entry.second == id; });
  DS_CHECK(it != end);
  by_hash_.erase(it);
  page.node = 0;
}

}  // namespace ds
