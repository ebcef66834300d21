// SPDX-License-Identifier: Apache-2.0
// Page ownership: exact matches only, nothing shared across versions, least recently used goes
// first, and no page is ever lost or held twice (randomised against a simple model).
#include "engine/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "storage/seams.h"

namespace ds {
namespace {

std::vector<TokenId> tokens(int64_t n, TokenId first = 0) {
  std::vector<TokenId> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(first + static_cast<TokenId>(i));
  return out;
}

/// Allocates, publishes and releases pages for a text, as a finished sequence does.
void remember(KvCache& cache, uint64_t id, const std::vector<TokenId>& text) {
  std::vector<int32_t> pages;
  ASSERT_TRUE(cache.allocate(pages_for(std::ssize(text)), pages));
  cache.publish(id, text, pages);
  cache.release(pages);
}

int64_t matched(KvCache& cache, uint64_t id, const std::vector<TokenId>& text) {
  std::vector<int32_t> pages;
  const int64_t n = cache.match(id, text, pages);
  EXPECT_EQ(std::ssize(pages) * kKvPageTokens, n);
  cache.release(pages);
  return n;
}

TEST(KvCache, MatchesFullPagesOfAnEqualBeginning) {
  KvCache cache(16, true);
  remember(cache, 1, tokens(100));
  EXPECT_EQ(cache.cached(), 3);  // the part page is free again
  EXPECT_EQ(matched(cache, 1, tokens(100)), 96);
  EXPECT_EQ(matched(cache, 1, tokens(95)), 64);
  EXPECT_EQ(matched(cache, 1, tokens(31)), 0);
  std::vector<TokenId> other = tokens(100);
  other[40] = 7;
  EXPECT_EQ(matched(cache, 1, other), 32);
  other = tokens(100);
  other[0] = 7;  // the same second page behind another first one is another page
  EXPECT_EQ(matched(cache, 1, other), 0);
}

TEST(KvCache, AnotherVersionNeverMatches) {
  KvCache cache(16, true);
  remember(cache, 1, tokens(96));
  EXPECT_EQ(matched(cache, 2, tokens(96)), 0);
  remember(cache, 2, tokens(64));
  EXPECT_EQ(matched(cache, 2, tokens(96)), 64);
  EXPECT_EQ(matched(cache, 1, tokens(96)), 96);
  EXPECT_EQ(cache.cached(), 5);
}

TEST(KvCache, WithoutPrefixesNothingStays) {
  KvCache cache(4, false);
  remember(cache, 1, tokens(64));
  EXPECT_EQ(cache.free(), 4);
  EXPECT_EQ(matched(cache, 1, tokens(64)), 0);
}

TEST(KvCache, EvictsTheLeastRecentlyUsedAndDeepestFirst) {
  KvCache cache(4, true);
  remember(cache, 1, tokens(64));                // A: 2 pages
  remember(cache, 1, tokens(64, 1000));          // B: 2 pages
  EXPECT_EQ(matched(cache, 1, tokens(64)), 64);  // A is fresher now
  std::vector<int32_t> pages;
  ASSERT_TRUE(cache.allocate(1, pages));
  EXPECT_EQ(matched(cache, 1, tokens(64, 1000)), 32);  // B lost its end, not its beginning
  EXPECT_EQ(matched(cache, 1, tokens(64)), 64);
  ASSERT_TRUE(cache.allocate(1, pages));
  EXPECT_EQ(matched(cache, 1, tokens(64, 1000)), 0);
  ASSERT_TRUE(cache.allocate(2, pages));
  EXPECT_FALSE(cache.allocate(1, pages));
  EXPECT_EQ(pages.size(), 4u);
  cache.release(pages);
  EXPECT_EQ(cache.free(), 4);
}

TEST(KvCache, HeldPagesAreNotEvicted) {
  KvCache cache(3, true);
  remember(cache, 1, tokens(64));
  std::vector<int32_t> held, pages;
  ASSERT_EQ(cache.match(1, tokens(64), held), 64);
  EXPECT_FALSE(cache.allocate(2, pages));
  EXPECT_TRUE(pages.empty());
  EXPECT_TRUE(cache.allocate(1, pages));
  cache.release(held);
  EXPECT_TRUE(cache.allocate(2, pages));
}

TEST(KvCache, EqualPagesBecomeOne) {
  KvCache cache(8, true);
  std::vector<int32_t> a, b;
  ASSERT_TRUE(cache.allocate(3, a));
  ASSERT_TRUE(cache.allocate(3, b));
  cache.publish(1, tokens(70), a);
  cache.publish(1, tokens(70), b);
  EXPECT_EQ(a[0], b[0]);
  EXPECT_EQ(a[1], b[1]);
  EXPECT_NE(a[2], b[2]);  // not full: each its own
  EXPECT_EQ(cache.held(), 4);
  cache.publish(1, tokens(96), b);  // goes on behind the shared part
  cache.release(a);
  EXPECT_EQ(matched(cache, 1, tokens(96)), 96);
  cache.release(b);
  EXPECT_EQ(cache.held(), 0);
  EXPECT_EQ(cache.cached(), 3);
}

TEST(KvCache, RandomUseNeverLosesOrDoublesAPage) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    SCOPED_TRACE(seed);
    Rng rng(seed);
    KvCache cache(24, true);
    struct Live {
      uint64_t id;
      std::vector<TokenId> text;
      std::vector<int32_t> pages;
    };
    std::vector<Live> live;
    // What each page holds by the rules: written once, when allocated for a block of a text.
    std::map<int32_t, std::pair<uint64_t, std::vector<TokenId>>> content;
    for (int step = 0; step < 400; ++step) {
      if (rng.below(2) == 0 && live.size() < 4) {
        Live s{1 + rng.below(2), {}, {}};
        const auto n = static_cast<int64_t>(32 + rng.below(120));
        for (int64_t i = 0; i < n; ++i)
          s.text.push_back(static_cast<TokenId>(i < 64 ? rng.below(2) * (i == 5) : i));
        const int64_t hit = cache.match(s.id, s.text, s.pages);
        for (int64_t p = 0; p < hit / kKvPageTokens; ++p) {
          const auto& [id, prefix] = content.at(s.pages[static_cast<size_t>(p)]);
          ASSERT_EQ(id, s.id);
          ASSERT_TRUE(std::equal(prefix.begin(), prefix.end(), s.text.begin()));
          ASSERT_EQ(std::ssize(prefix), (p + 1) * kKvPageTokens);
        }
        const int64_t missing = pages_for(n) - std::ssize(s.pages);
        if (!cache.allocate(missing, s.pages)) {
          cache.release(s.pages);
          continue;
        }
        for (int64_t p = hit / kKvPageTokens; p < pages_for(n); ++p) {
          const int64_t end = std::min(n, (p + 1) * kKvPageTokens);
          content[s.pages[static_cast<size_t>(p)]] = {s.id, {s.text.begin(), s.text.begin() + end}};
        }
        live.push_back(std::move(s));
      } else if (!live.empty()) {
        const size_t at = rng.below(live.size());
        if (rng.below(4) != 0) cache.publish(live[at].id, live[at].text, live[at].pages);
        if (rng.below(2) == 0) {
          cache.release(live[at].pages);
          live.erase(live.begin() + static_cast<ptrdiff_t>(at));
        }
      }
      std::set<int32_t> held;
      for (const Live& s : live) held.insert(s.pages.begin(), s.pages.end());
      ASSERT_EQ(cache.held(), std::ssize(held));
      ASSERT_GE(cache.free(), 0);
    }
    for (Live& s : live) cache.release(s.pages);
    std::vector<int32_t> all;
    ASSERT_TRUE(cache.allocate(24, all));
    EXPECT_EQ(std::set<int32_t>(all.begin(), all.end()).size(), 24u);
  }
}

}  // namespace
}  // namespace ds
