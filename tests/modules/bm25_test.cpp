// SPDX-License-Identifier: Apache-2.0
// The BM25 retriever as a file, through its table: scores against the formula written down plainly
// in double precision over all texts, what is seen when, filters, and its saved form.
#include <gmock/gmock.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <set>
#include <sstream>
#include <thread>

#include "tests/bench/facts.h"
#include "tests/modules/module_file.h"

namespace ds::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class Bm25 : public ModuleFile {
 public:
  explicit Bm25(Config config = {}) : ModuleFile("retriever_bm25", std::move(config)) {}

  ds_code put(std::uint64_t id, std::string_view what, std::string_view meta = {}) {
    return table<ds_retriever>().put(instance, id, sdk::str(what), nullptr, sdk::str(meta), &st);
  }
  void erase(std::vector<std::uint64_t> ids) {
    EXPECT_EQ(table<ds_retriever>().erase(instance, ids.data(), ids.size(), &st), DS_OK);
  }
  std::uint64_t commit() {
    std::uint64_t version = 0;
    EXPECT_EQ(table<ds_retriever>().commit(instance, &version, &st), DS_OK) << text();
    return version;
  }
  ds_code try_search(std::string_view query, std::string_view filter, std::vector<ds_hit>& out,
                     std::uint64_t max = 1000) {
    std::uint64_t n = 0;
    out.assign(max, {});
    ds_status own{};  // searches run on several threads
    const ds_code code = table<ds_retriever>().search(instance, &call, sdk::str(query), nullptr,
                                                      sdk::str(filter), out.data(), max, &n, &own);
    out.resize(n);
    if (code != DS_OK) st = own;
    return code;
  }
  std::vector<ds_hit> search(std::string_view query, std::string_view filter = {},
                             std::uint64_t max = 1000) {
    std::vector<ds_hit> out;
    EXPECT_EQ(try_search(query, filter, out, max), DS_OK) << text();
    return out;
  }
  std::vector<std::uint64_t> ids(std::string_view query, std::string_view filter = {}) {
    std::vector<std::uint64_t> out;
    for (const ds_hit& hit : search(query, filter)) out.push_back(hit.id);
    return out;
  }
  ds_code fetch(std::uint64_t id, std::string& what, std::string& meta) {
    what.clear(), meta.clear();
    const ds_sink a = sink_into(what), b = sink_into(meta);
    return table<ds_retriever>().fetch(instance, id, &a, &b, &st);
  }
};

/// The formula over texts of lower-case words with single spaces between.
double formula(const std::map<std::uint64_t, std::string>& texts, std::uint64_t id,
               const std::string& query, double k1, double b) {
  const auto split = [](const std::string& text) {
    std::istringstream in(text);
    return std::vector<std::string>(std::istream_iterator<std::string>(in), {});
  };
  double words = 0, score = 0;
  for (const auto& [other, text] : texts) words += static_cast<double>(split(text).size());
  const double all = static_cast<double>(texts.size()), average = words / all;
  const auto here = split(texts.at(id));
  for (const std::string& word : split(query)) {
    double n = 0;
    for (const auto& [other, text] : texts) {
      const auto there = split(text);
      n += std::count(there.begin(), there.end(), word) > 0 ? 1 : 0;
    }
    const auto tf = static_cast<double>(std::count(here.begin(), here.end(), word));
    const double norm = k1 * (1 - b + b * static_cast<double>(here.size()) / average);
    if (tf > 0) score += std::log(1 + (all - n + 0.5) / (n + 0.5)) * tf * (k1 + 1) / (tf + norm);
  }
  return score;
}

const std::map<std::uint64_t, std::string>& corpus() {
  static const std::map<std::uint64_t, std::string> texts = {
      {7, "the quick brown fox jumps over the lazy dog"},
      {3, "the dog sleeps"},
      {12, "a fox and a fox and another fox"},
      {1, "nothing to see here"},
      {40, "the the the the"},
      {41, "größe zählt für den fuchs 42"}};
  return texts;
}
void put_corpus(Bm25& index) {
  for (const auto& [id, text] : corpus()) ASSERT_EQ(index.put(id, text), DS_OK) << index.text();
  index.commit();
}

TEST(Bm25, ScoresByTheFormula) {
  for (const auto& [k1, b] : {std::pair{1.2, 0.75}, {0.0, 0.3}, {2.5, 1.0}, {1.0, 0.0}}) {
    Bm25 index({{"k1", k1}, {"b", b}});
    put_corpus(index);
    for (const std::string query :
         {"fox", "the dog", "the the dog", "größe 42 fox", "unheard of", "the lazy fox sleeps"}) {
      std::map<std::uint64_t, float> got;
      float before = std::numeric_limits<float>::infinity();
      for (const ds_hit& hit : index.search(query)) {
        got[hit.id] = hit.score;
        EXPECT_LE(hit.score, before) << query;
        before = hit.score;
      }
      for (const auto& [id, text] : corpus()) {
        const double want = formula(corpus(), id, query, k1, b);
        EXPECT_NEAR(got.contains(id) ? got[id] : 0, want, 1e-6 * (1 + want)) << query << " " << id;
        EXPECT_EQ(got.contains(id), want > 0) << query << " " << id;
      }
    }
  }
}

TEST(Bm25, WordsAreFoldedInAsciiOnly) {
  Bm25 index;
  index.put(1, "FOO-bar_Baz\xC3\x84x 9lives");
  index.put(2, std::string_view("\xC3\xA4x foo\0bar", 11));
  index.commit();
  EXPECT_THAT(index.ids("foo"), ElementsAre(2, 1));  // 2 is shorter
  EXPECT_THAT(index.ids("BAR"), ElementsAre(2, 1));  // a text ends at its length, not at NUL
  EXPECT_THAT(index.ids("BAZ\xC3\x84X"), ElementsAre(1));
  EXPECT_THAT(index.ids("baz"), IsEmpty());
  EXPECT_THAT(index.ids("9lives"), ElementsAre(1));
  EXPECT_THAT(index.ids("\xC3\xA4X"), ElementsAre(2));
  EXPECT_THAT(index.ids(""), IsEmpty());
  EXPECT_THAT(index.ids(" .,!"), IsEmpty());
}

TEST(Bm25, EqualScoresComeByLowerIdAndMaxHolds) {
  Bm25 index;
  for (const std::uint64_t id : {9u, 2u, 30u, 4u}) index.put(id, "same words");
  index.put(5, "same same words");
  index.commit();
  EXPECT_THAT(index.ids("same"), ElementsAre(5, 2, 4, 9, 30));
  EXPECT_EQ(index.search("same", {}, 2).size(), 2u);
  EXPECT_EQ(index.search("same", {}, 2)[1].id, 2u);
  EXPECT_THAT(index.search("same", {}, 0), IsEmpty());
}

TEST(Bm25, ChangesAreSeenAfterCommitAllAtOnce) {
  Bm25 index;
  std::string what, meta;
  EXPECT_THAT(index.ids("fox"), IsEmpty());
  index.put(1, "fox", R"({"a":1})");
  index.put(2, "fox");
  EXPECT_THAT(index.ids("fox"), IsEmpty());
  EXPECT_EQ(index.fetch(1, what, meta), DS_E_ARG);
  EXPECT_EQ(index.commit(), 1u);
  EXPECT_THAT(index.ids("fox"), ElementsAre(1, 2));
  EXPECT_EQ(index.fetch(1, what, meta), DS_OK);
  EXPECT_EQ(what + meta, R"(fox{"a":1})");

  index.put(1, "hound");
  index.erase({2, 77});
  index.put(3, "fox again");
  EXPECT_THAT(index.ids("fox"), ElementsAre(1, 2));
  EXPECT_EQ(index.commit(), 2u);
  EXPECT_THAT(index.ids("fox"), ElementsAre(3));
  EXPECT_THAT(index.ids("hound"), ElementsAre(1));
  EXPECT_EQ(index.fetch(2, what, meta), DS_E_ARG);
  EXPECT_THAT(index.text(), HasSubstr("no text with id 2"));

  index.erase({3});
  index.put(3, "back");  // the last word counts
  index.commit();
  EXPECT_THAT(index.ids("back"), ElementsAre(3));
}

/// Many changes leave what putting the last texts at once gives: scores are of what is there now.
TEST(Bm25, AnErasedTextLeavesNoTrace) {
  Bm25 fresh, changed;
  put_corpus(fresh);
  for (const std::uint64_t id : {3u, 7u, 100u, 101u}) changed.put(id, "the fox was here before");
  changed.commit();
  changed.erase({100});
  changed.commit();
  changed.erase({101});
  put_corpus(changed);
  for (const std::string query : {"fox", "the dog", "before"}) {
    const auto a = fresh.search(query), b = changed.search(query);
    ASSERT_EQ(a.size(), b.size()) << query;
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_EQ(a[i].id, b[i].id) << query;
      EXPECT_EQ(a[i].score, b[i].score) << query;
    }
  }
}

TEST(Bm25, FiltersByEqualMetaKeys) {
  Bm25 index;
  index.put(1, "fox", R"({"lang":"en","year":2009,"draft":false})");
  index.put(2, "fox", R"({"lang":"de","year":2009.0})");
  index.put(3, "fox", R"({"lang":"en","year":"2009","draft":true})");
  index.put(4, "fox");
  index.commit();
  EXPECT_THAT(index.ids("fox", "{}"), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(index.ids("fox", R"({"lang":"en"})"), ElementsAre(1, 3));
  EXPECT_THAT(index.ids("fox", R"({"lang":"EN"})"), IsEmpty());
  EXPECT_THAT(index.ids("fox", R"({"year":2009})"), ElementsAre(1, 2));
  EXPECT_THAT(index.ids("fox", R"({"year":"2009"})"), ElementsAre(3));
  EXPECT_THAT(index.ids("fox", R"({"lang":"en","draft":false})"), ElementsAre(1));
  EXPECT_THAT(index.ids("fox", R"({"size":1})"), IsEmpty());

  const auto refused = [&](const char* filter) {
    std::vector<ds_hit> hits;
    EXPECT_EQ(index.try_search("fox", filter, hits), DS_E_ARG) << filter;
    return index.text();
  };
  EXPECT_EQ(refused(R"({"lang":)"), "filter: not JSON");
  EXPECT_EQ(refused(R"(["lang"])"), "filter: array, expected an object");
  EXPECT_THAT(refused(R"({"year":{"$gt":3}})"), HasSubstr("filter: \"year\": object, expected"));
  EXPECT_THAT(refused(R"({"lang":null})"), HasSubstr("\"lang\": null"));
  EXPECT_EQ(index.put(5, "fox", "[1]"), DS_E_ARG);
  EXPECT_EQ(index.text(), "meta: array, expected an object");
  EXPECT_EQ(index.put(5, "fox", std::string(100'000, '[')), DS_E_ARG);
}

TEST(Bm25, WhatIsSavedComesBack) {
  Bm25 from, to;
  put_corpus(from);
  from.put(8, std::string("fox\0hole", 8), R"({"a":"b"})");
  from.commit();
  from.put(9, "fox, not committed");
  const std::string state = from.save();
  to.put(50, "fox, gone after restore");
  to.commit();
  to.put(51, "fox, too");
  ASSERT_EQ(to.restore(state), DS_OK) << to.text();
  EXPECT_EQ(to.save(), state);
  EXPECT_EQ(to.commit(), 3u);
  from.erase({9});
  from.commit();
  EXPECT_EQ(to.ids("fox"), from.ids("fox"));
  EXPECT_EQ(to.search("fox")[0].score, from.search("fox")[0].score);
  EXPECT_THAT(to.ids("hole", R"({"a":"b"})"), ElementsAre(8));
  std::string what, meta;
  ASSERT_EQ(to.fetch(8, what, meta), DS_OK);
  EXPECT_EQ(what, std::string("fox\0hole", 8));
}

TEST(Bm25, BrokenStateIsRefusedAndChangesNothing) {
  Bm25 index;
  put_corpus(index);
  const std::string state = index.save();
  for (std::size_t n = 0; n < state.size(); ++n) {
    ASSERT_EQ(index.restore(std::string_view(state).substr(0, n)), DS_E_DATA) << n;
    std::string flipped = state;
    flipped[n] ^= 0x10;
    ASSERT_EQ(index.restore(flipped), DS_E_DATA) << n;
    EXPECT_THAT(index.text(), HasSubstr("saved state: "));
  }
  EXPECT_EQ(index.restore(state + "x"), DS_E_DATA);
  EXPECT_EQ(index.restore(std::string(10'000, '\xff')), DS_E_DATA);
  EXPECT_EQ(index.save(), state);
}

TEST(Bm25, SaysWhatItCannotDo) {
  Bm25 index;
  EXPECT_EQ(index.create({{"k1", NAN}}), DS_E_CONFIG);
  EXPECT_EQ(index.create({{"k1", -1}}), DS_E_CONFIG);
  EXPECT_EQ(index.create({{"b", 1.5}}), DS_E_CONFIG);
  EXPECT_THAT(index.text(), HasSubstr("b: 1.5"));
  ASSERT_EQ(index.create({}), DS_OK);
  put_corpus(index);
  const float before = index.search("fox")[0].score;
  EXPECT_EQ(index.reconfigure({{"k1", 0}}), DS_OK);
  EXPECT_NE(index.search("fox")[0].score, before);
  std::vector<ds_hit> hits;
  const std::uint32_t stop = 1;
  index.call.cancel = &stop;
  EXPECT_EQ(index.try_search("fox", {}, hits), DS_E_CANCELLED);
  index.call.cancel = nullptr;
  index.call.deadline_ns = 1;
  EXPECT_EQ(index.try_search("fox", {}, hits), DS_E_DEADLINE);
}

/// Each commit moves all texts from one word to the other, so a search that saw half of it would
/// find a text by both or by neither.
TEST(Bm25, SearchesSeeWholeStatesWhileOthersCommit) {
  Bm25 index;
  constexpr std::uint64_t kTexts = 50;
  const auto fill = [&](const char* word) {
    for (std::uint64_t id = 0; id < kTexts; ++id) index.put(id, word);
    index.commit();
  };
  fill("even");
  std::atomic<bool> done{false};
  std::atomic<int> searches{0}, halves{0};
  std::vector<std::thread> readers;
  for (int t = 0; t < 3; ++t) {
    readers.emplace_back([&] {
      while (!done) {
        const std::size_t n = index.search("even odd").size();
        const std::size_t even = index.search("even").size();
        if (n != kTexts || (even != 0 && even != kTexts)) ++halves;
        ++searches;
      }
    });
  }
  for (int i = 0; i < 100 || searches < 100; ++i) fill(i % 2 == 0 ? "odd" : "even");
  done = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(halves, 0);
}

/// A made-up fact is found by its paraphrases among others of the same kinds.
TEST(Bm25, ParaphrasesFindTheirFact) {
  Rng rng(1);
  std::vector<bench::Fact> facts;
  std::set<std::string> questions;
  for (std::size_t kind = 0; facts.size() < 100; ++kind) {
    bench::Fact fact = bench::draw_fact(rng, kind);
    if (questions.insert(fact.question).second) facts.push_back(std::move(fact));
  }
  Bm25 index;
  for (std::size_t i = 0; i < facts.size(); ++i)
    index.put(i, facts[i].question + " " + facts[i].answer);
  index.commit();
  int asked = 0, first = 0;
  for (std::size_t i = 0; i < facts.size(); ++i) {
    for (const std::string& paraphrase : facts[i].paraphrases) {
      const auto hits = index.search(paraphrase, {}, 1);
      first += !hits.empty() && hits[0].id == i ? 1 : 0;
      ++asked;
    }
  }
  RecordProperty("recall_at_1", std::to_string(static_cast<double>(first) / asked));
  EXPECT_GE(first, 0.95 * asked) << first << " of " << asked;
}

}  // namespace
}  // namespace ds::test
