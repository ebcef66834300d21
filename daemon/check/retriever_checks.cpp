// SPDX-License-Identifier: Apache-2.0
// Retrievers: a small knowledge base as the operation, and level 2: what commit makes visible, the
// order of hits, documents that come back as they went in.
#include <algorithm>
#include <cmath>
#include <set>

#include "check/allocations.h"
#include "check/check.h"

namespace ds::check {
namespace {

ds_str abi(std::string_view s) { return {s.data(), s.size()}; }

struct Document {
  uint64_t id;
  std::string text, meta;
};

constexpr const char* kWords[] = {"river", "stone",  "lantern", "harbour", "copper",
                                  "maple", "winter", "signal",  "orchard", "thread"};

std::vector<Document> documents(size_t n, uint64_t content) {
  std::vector<Document> out;
  for (size_t i = 0; i < n; ++i) {
    std::string text = "the drift";
    for (size_t k = 0; k <= i % 7; ++k)
      text += std::string(" ") + kWords[(i * 3 + k + content) % 10];
    out.push_back({content % 100000 * 1000 + i + 1, text, R"({"n":)" + std::to_string(i) + "}"});
  }
  return out;
}

/// The calls, on one instance. Embeddings go along for those who need them.
class Base {
 public:
  explicit Base(Trial& t) : t_(t), table_(table_of<ds_retriever>(t.component)) {
    const std::vector<float> values(64, 0.125f);
    embedding_ = t.tensor("embedding", kF32, {64}, values.data(), false, false);
  }
  bool put(const Document& d) {
    return t_.invoke("put", [&](ds_status* st) {
      return table_.put(t_.instance, d.id, abi(d.text), embedding_, abi(d.meta), st);
    });
  }
  bool erase(uint64_t id) {
    return t_.invoke("erase", [&](ds_status* st) { return table_.erase(t_.instance, &id, 1, st); });
  }
  bool commit() {
    uint64_t version = 0;
    return t_.invoke("commit",
                     [&](ds_status* st) { return table_.commit(t_.instance, &version, st); });
  }
  std::vector<ds_hit> search(const std::string& text, uint64_t max) {
    auto* room = reinterpret_cast<ds_hit*>(t_.buffer(max * sizeof(ds_hit)));
    uint64_t n = 0;
    const ds_call* call = t_.call(0);
    if (!t_.invoke("search", [&](ds_status* st) {
          return table_.search(t_.instance, call, abi(text), embedding_, abi(""), room, max, &n,
                               st);
        }))
      return {};
    if (n > max) {
      t_.breaks("search gave " + std::to_string(n) + " hits, asked for " + std::to_string(max));
      return {};
    }
    t_.add_output(room, n * sizeof(ds_hit));
    return {room, room + n};
  }
  bool fetch(uint64_t id, std::string& text, std::string& meta) {
    text.clear();
    meta.clear();
    ds_sink to_text{}, to_meta{};
    to_text.ctx = &text;
    to_meta.ctx = &meta;
    to_text.write = to_meta.write = collect;
    const ds_sink* first = t_.give("ds_sink", to_text);
    const ds_sink* second = t_.give("ds_sink", to_meta);
    return t_.invoke(
        "fetch", [&](ds_status* st) { return table_.fetch(t_.instance, id, first, second, st); });
  }

 private:
  Trial& t_;
  ds_retriever table_;
  const ds_tensor* embedding_;
};

/// Leaves all but one of its documents in the instance.
void fill_and_search(Trial& t) {
  Base base(t);
  const auto all =
      documents(t.options.empty ? 0 : static_cast<size_t>(8 * t.options.scale), t.options.content);
  for (const Document& d : all) {
    if (!base.put(d)) return;
  }
  if (!base.commit()) return;
  base.search(t.options.empty ? "" : "drift river stone", t.options.empty ? 0 : 64);
  if (t.code != DS_OK || all.empty()) return;
  std::string text, meta;
  if (!base.fetch(all[1].id, text, meta)) return;
  t.add_output(text.data(), text.size());
  if (base.erase(all[0].id) && base.commit()) base.search("drift maple", 64);
}

bool among(const std::vector<ds_hit>& hits, uint64_t id) {
  return std::any_of(hits.begin(), hits.end(), [&](const ds_hit& h) { return h.id == id; });
}

Verdict visibility(Bench& bench) {
  const Instance instance(bench);
  Trial t(bench.component, instance.get(), {});
  Base base(t);
  const auto all = documents(6, 1);
  const auto query = [&] { return base.search(all[3].text, 64); };
  for (const Document& d : all) {
    if (!base.put(d)) return failed("put: " + t.text);
  }
  if (!query().empty()) return failed("a text is found before commit");
  base.commit();
  if (!among(query(), all[3].id))
    return failed("a text is not found by its own words after commit");
  base.erase(all[3].id);
  if (!among(query(), all[3].id)) return failed("an erased text is gone before commit");
  base.commit();
  if (among(query(), all[3].id)) return failed("an erased text is still found after commit");
  std::string text, meta;
  if (base.fetch(all[3].id, text, meta)) return failed("an erased text can still be fetched");
  if (t.code != DS_E_ARG)
    return failed("fetch without such an id gave " + std::to_string(t.code) + ", expected 1");
  return pass();
}

Verdict hits(Bench& bench) {
  const Instance instance(bench);
  Trial t(bench.component, instance.get(), {});
  Base base(t);
  std::set<uint64_t> known;
  const auto all = documents(40, 1);
  for (auto d = all.rbegin(); d != all.rend(); ++d) {  // ids in descending order
    known.insert(d->id);
    if (!base.put(*d)) return failed("put: " + t.text);
  }
  base.commit();
  for (const uint64_t max : {uint64_t{0}, uint64_t{3}, uint64_t{64}}) {
    for (const char* query : {"drift river stone copper", "lantern", "winter signal drift"}) {
      const auto found = base.search(query, max);
      if (!t.broken.empty()) return failed(t.broken);
      std::set<uint64_t> ids;
      for (size_t i = 0; i < found.size(); ++i) {
        if (!std::isfinite(found[i].score)) return failed("a score is not finite");
        if (known.count(found[i].id) == 0 || !ids.insert(found[i].id).second)
          return failed("hit " + std::to_string(found[i].id) + " is unknown or comes twice");
        if (i == 0) continue;
        const bool in_order =
            found[i - 1].score > found[i].score ||
            (found[i - 1].score == found[i].score && found[i - 1].id < found[i].id);
        if (!in_order)
          return failed("hits " + std::to_string(i - 1) + " and " + std::to_string(i) +
                        " are not in order of score, then id");
      }
    }
  }
  return pass();
}

Verdict fetched(Bench& bench) {
  const Instance instance(bench);
  Trial t(bench.component, instance.get(), {});
  Base base(t);
  const auto all = documents(12, 1);
  for (const Document& d : all) {
    if (!base.put(d)) return failed("put: " + t.text);
  }
  Document again = all[2];
  again.text = "another text under the same id";
  base.put(again);
  base.commit();
  std::string text, meta;
  for (const Document& d : all) {
    const Document& want = d.id == again.id ? again : d;
    if (!base.fetch(d.id, text, meta)) return failed("fetch: " + t.text);
    if (text != want.text || meta != want.meta)
      return failed("text or metadata of id " + std::to_string(d.id) + " came back changed");
  }
  return pass();
}

}  // namespace

std::vector<Operation> retriever_operations() {
  return {{"search", [](const ds_component&) { return true; }, fill_and_search}};
}

std::vector<Check> retriever_checks() {
  const uint32_t kind = DS_KIND_RETRIEVER;
  return {{"numerics.visibility", 2, kind, {}, visibility},
          {"numerics.hits", 2, kind, {}, hits},
          {"numerics.documents", 2, kind, {}, fetched}};
}

}  // namespace ds::check
