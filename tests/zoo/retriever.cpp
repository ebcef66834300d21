// SPDX-License-Identifier: Apache-2.0
// Retrievers that break one rule each: shared words, counted.
#include <map>

#include "tests/zoo/zoo.h"

namespace {

enum fault {
  sound,
  shows_before_commit,
  unsorted_hits,
  changes_documents,
  loses_state,
  takes_garbage
};
constexpr std::string_view names[] = {"sound",         "shows_before_commit",
                                      "unsorted_hits", "changes_documents",
                                      "loses_state",   "takes_garbage"};
constexpr std::string_view magic = "zoo1";

template <fault F>
struct retriever {
  static constexpr std::string_view name = names[F];
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_DETERMINISTIC;
  explicit retriever(ds::sdk::context) {}

  void put(std::uint64_t id, std::string_view text, const ds_tensor*, std::string_view meta) {
    coming[id] = {std::string(text), std::string(meta)};
  }
  void erase(std::span<const std::uint64_t> ids) {
    for (const std::uint64_t id : ids) coming.erase(id);
  }
  std::uint64_t commit() {
    shown = coming;
    return ++version;
  }
  std::vector<ds_hit> search(const ds_call&, std::string_view text, const ds_tensor*,
                             std::string_view, std::uint64_t max) const {
    std::vector<ds_hit> hits;
    for (const auto& [id, d] : F == shows_before_commit ? coming : shown) {
      float score = 0;
      for (std::size_t at = 0; at < text.size();) {
        const std::size_t end = std::min(text.find(' ', at), text.size());
        score += d.text.find(text.substr(at, end - at)) != d.text.npos;
        at = end + 1;
      }
      if (score > 0) hits.push_back({id, score, 0});
    }
    if (F != unsorted_hits) std::ranges::stable_sort(hits, std::greater{}, &ds_hit::score);
    if (hits.size() > max) hits.resize(max);
    return hits;
  }
  ds::sdk::document fetch(std::uint64_t id) const {
    const auto at = shown.find(id);
    if (at == shown.end()) throw ds::sdk::error(DS_E_ARG, "no such id");
    ds::sdk::document out = at->second;
    if (F == changes_documents) out.text += '\n';
    return out;
  }

  std::string save() const {
    std::string out(magic);
    for (const auto& [id, d] : shown) {
      if (F == loses_state && id % 2 == 0) continue;
      for (const std::uint64_t n :
           {id, std::uint64_t(d.text.size()), std::uint64_t(d.meta_json.size())})
        out.append(reinterpret_cast<const char*>(&n), sizeof n);
      out += d.text + d.meta_json;
    }
    return out;
  }
  void restore(std::string_view bytes, std::string_view) {
    if (!bytes.starts_with(magic)) {
      if (F == takes_garbage) return;
      throw ds::sdk::error(DS_E_DATA, "saved state: not mine");
    }
    bytes.remove_prefix(magic.size());
    documents all;
    while (!bytes.empty()) {
      const std::uint64_t id = number(bytes), text = number(bytes), meta = number(bytes);
      ds::sdk::document& d = all[id];
      d.text = take(bytes, text);
      d.meta_json = take(bytes, meta);
    }
    coming = shown = all;
  }

 private:
  using documents = std::map<std::uint64_t, ds::sdk::document>;
  static std::string_view take(std::string_view& bytes, std::uint64_t n) {
    if (n > bytes.size()) throw ds::sdk::error(DS_E_DATA, "saved state: cut off");
    const std::string_view out = bytes.substr(0, n);
    bytes.remove_prefix(n);
    return out;
  }
  static std::uint64_t number(std::string_view& bytes) {
    std::uint64_t n;
    std::memcpy(&n, take(bytes, sizeof n).data(), sizeof n);
    return n;
  }
  documents coming, shown;
  std::uint64_t version = 0;
};

}  // namespace

DS_PLUGIN("org.driftstone.zoo.retriever", "1.0.0", "Apache-2.0", retriever<sound>,
          retriever<shows_before_commit>, retriever<unsorted_hits>, retriever<changes_documents>,
          retriever<loses_state>, retriever<takes_garbage>)
