// SPDX-License-Identifier: Apache-2.0
// Retriever: the share of the query's words that a text has. All changes since the last commit show
// at once; what is saved can be restored.
#include <map>
#include <mutex>
#include <set>

#include "ds/plugin.hpp"

struct token_overlap {
  static constexpr std::string_view name = "token-overlap";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_DETERMINISTIC | DS_CAP_OUT_OF_PROCESS;
  explicit token_overlap(ds::sdk::context) {}

  void put(std::uint64_t id, std::string_view text, const ds_tensor*, std::string_view meta) {
    coming.insert_or_assign(id, entry{words(text), {std::string(text), std::string(meta)}});
  }
  void erase(std::span<const std::uint64_t> ids) {
    for (const std::uint64_t id : ids) coming.erase(id);
  }
  std::uint64_t commit() {
    const auto next = std::make_shared<const entries>(coming);
    const std::lock_guard lock(mutex);
    published = next;
    return ++version;
  }

  // From any thread, while others put and commit: works on what was published when it began.
  std::vector<ds_hit> search(const ds_call&, std::string_view text, const ds_tensor*,
                             std::string_view filter, std::uint64_t max) const {
    if (!filter.empty() && filter != "{}")
      throw ds::sdk::error(DS_E_UNSUPPORTED, "filter: this retriever has none");
    const auto wanted = words(text);
    std::vector<ds_hit> hits;
    const auto all = current();
    for (const auto& [id, e] : *all) {
      const std::set<std::string>& have = e.words;
      const auto found = std::ranges::count_if(wanted, [&](auto& w) { return have.contains(w); });
      if (found > 0)
        hits.push_back({id, static_cast<float>(found) / static_cast<float>(wanted.size()), 0});
    }
    std::ranges::stable_sort(hits, std::greater{}, &ds_hit::score);  // equals stay in order of id
    if (hits.size() > max) hits.resize(max);
    return hits;
  }
  ds::sdk::document fetch(std::uint64_t id) const {
    const auto all = current();
    const auto at = all->find(id);
    if (at == all->end()) throw ds::sdk::error(DS_E_ARG, "no text with id " + std::to_string(id));
    return at->second.document;
  }

  // Saved form: version, count, then for each text its id, the two lengths and the bytes.
  std::string save() const {
    const auto all = current();
    std::string out;
    for (const std::uint64_t n : {version, std::uint64_t{all->size()}}) append(out, n);
    for (const auto& [id, e] : *all) {
      for (const std::uint64_t n :
           {id, std::uint64_t{e.document.text.size()}, std::uint64_t{e.document.meta_json.size()}})
        append(out, n);
      out += e.document.text + e.document.meta_json;
    }
    return out;
  }
  void restore(std::string_view bytes, std::string_view /*saved by this version of the plugin*/) {
    const std::uint64_t saved_version = number(bytes), count = number(bytes);
    entries restored;
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint64_t id = number(bytes), text_size = number(bytes), meta_size = number(bytes);
      const std::string_view text = take(bytes, text_size), meta = take(bytes, meta_size);
      restored.insert_or_assign(id, entry{words(text), {std::string(text), std::string(meta)}});
    }
    if (!bytes.empty()) throw ds::sdk::error(DS_E_DATA, "saved state: bytes after its end");
    auto next = std::make_shared<const entries>(restored);  // nothing has changed up to here
    const std::lock_guard lock(mutex);
    coming = std::move(restored);
    published = std::move(next);
    version = saved_version;
  }

 private:
  struct entry {
    std::set<std::string> words;
    ds::sdk::document document;
  };
  using entries = std::map<std::uint64_t, entry>;

  static std::set<std::string> words(std::string_view text) {
    std::set<std::string> out;
    std::string word;
    for (const char c : std::string(text) + ' ') {
      const bool letter = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || (c & 0x80) != 0;
      if (letter || (c >= 'A' && c <= 'Z')) {
        word += static_cast<char>(letter ? c : c - 'A' + 'a');
      } else if (!word.empty()) {
        out.insert(std::exchange(word, {}));
      }
    }
    return out;
  }
  static void append(std::string& out, std::uint64_t n) {
    out.append(reinterpret_cast<const char*>(&n), sizeof n);
  }
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
  std::shared_ptr<const entries> current() const {
    const std::lock_guard lock(mutex);
    return published;
  }

  entries coming;
  mutable std::mutex mutex;
  std::shared_ptr<const entries> published = std::make_shared<const entries>();
  std::uint64_t version = 0;
};

DS_PLUGIN("org.driftstone.example.token-overlap", "1.0.0", "Apache-2.0", token_overlap)
