// SPDX-License-Identifier: Apache-2.0
// tokenizer.json of Hugging Face `tokenizers`, as far as it describes byte-level BPE.
#include <algorithm>

#include "storage/hf_folder.h"

namespace ds {
namespace {

Status wants(std::string_view what, std::string_view expected) {
  return invalid("tokenizer.json: " + std::string(what) + ", expected " + std::string(expected));
}

bool is_set(const Json& object, std::string_view key) {
  const Json* value = find(object, key);
  return value && !(value->is_boolean() && !value->get<bool>()) &&
         !(value->is_string() && value->get_ref<const std::string&>().empty());
}

std::string type_of(const Json& component) {
  const Json* type = find(component, "type");
  return type && type->is_string() ? type->get<std::string>() : "(without type)";
}

/// ByteLevel with the regular expression of GPT-2 and no invented leading space.
bool is_gpt2_byte_level(const Json& component) {
  const Json* use_regex = find(component, "use_regex");  // true when absent
  return type_of(component) == "ByteLevel" && !is_set(component, "add_prefix_space") &&
         find(component, "add_prefix_space") && (!use_regex || *use_regex == true);
}

/// Our name for a pre-tokenizer, or a refusal that spells out its parts.
Result<std::string> name_pre_tokenizer(const Json& tokenizer) {
  const Json* pre = find(tokenizer, "pre_tokenizer");
  constexpr const char* kExpected =
      ", expected Sequence[Digits(individual), ByteLevel] or ByteLevel alone, without prefix space";
  if (!pre) return unsupported(std::string("tokenizer.json: no pre_tokenizer") + kExpected);
  if (is_gpt2_byte_level(*pre)) return std::string("gpt-2");
  if (type_of(*pre) != "Sequence") {
    return unsupported("tokenizer.json: pre_tokenizer " + dump_json(*pre).substr(0, 200) +
                       kExpected);
  }
  const Json* parts = find(*pre, "pretokenizers");
  if (!parts || !parts->is_array()) return wants("Sequence without list", "\"pretokenizers\"");
  if (parts->size() == 2 && type_of((*parts)[0]) == "Digits" &&
      is_set((*parts)[0], "individual_digits") && is_gpt2_byte_level((*parts)[1])) {
    return std::string("smollm");
  }
  std::string names;
  for (const Json& part : *parts) names += (names.empty() ? "" : ", ") + type_of(part);
  return unsupported("tokenizer.json: pre_tokenizer Sequence[" + names + "]" + kExpected);
}

Status check_model(const Json& tokenizer, const Json& model) {
  if (type_of(model) != "BPE") {
    return unsupported("tokenizer.json: model " + type_of(model) + ", expected BPE");
  }
  if (const Json* normalizer = find(tokenizer, "normalizer")) {
    return unsupported("tokenizer.json: normalizer " + type_of(*normalizer) + ", expected none");
  }
  for (const char* option : {"dropout", "continuing_subword_prefix", "end_of_word_suffix",
                             "byte_fallback", "ignore_merges"}) {
    if (is_set(model, option)) {
      return unsupported("tokenizer.json: BPE option " + std::string(option) + " is set");
    }
  }
  return {};
}

Status place_token(const std::string& text, const Json& id, int64_t vocab,
                   std::vector<std::string>& tokens) {
  if (!id.is_number_integer() || id < 0 || id >= vocab) {
    return wants("token \"" + text + "\" has id " + dump_json(id),
                 "0 to " + std::to_string(vocab - 1));
  }
  const auto index = id.get<size_t>();
  if (index >= tokens.size()) tokens.resize(index + 1);
  if (!tokens[index].empty() && tokens[index] != text) {
    return invalid("tokenizer.json: tokens \"" + tokens[index] + "\" and \"" + text +
                   "\" have the same id " + dump_json(id));
  }
  tokens[index] = text;
  return {};
}

/// One past the largest id allowed: ids may have gaps, but a file of a few entries must not make a
/// table of millions.
int64_t id_limit(const Json& tokenizer, const Json& model, int64_t vocab) {
  const Json* entries = find(model, "vocab");
  const Json* added = find(tokenizer, "added_tokens");
  const size_t count = (entries ? entries->size() : 0) + (added ? added->size() : 0);
  return std::min(vocab, static_cast<int64_t>(2 * count + 1024));
}

Status read_vocab(const Json& model, int64_t vocab, TokenizerData& data) {
  const Json* entries = find(model, "vocab");
  if (!entries || !entries->is_object()) return wants("no \"vocab\"", "an object of token: id");
  for (const auto& [text, id] : entries->items()) {
    DS_TRY(place_token(text, id, vocab, data.tokens));
  }
  return {};
}

/// Merges come as "left right" or, since tokenizers 0.20, as ["left", "right"].
Status read_merges(const Json& model, TokenizerData& data) {
  const Json* merges = find(model, "merges");
  if (!merges || !merges->is_array()) return wants("no \"merges\"", "a list");
  data.merges.reserve(merges->size());
  for (const Json& merge : *merges) {
    if (merge.is_string()) {
      data.merges.push_back(merge.get<std::string>());
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      data.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
    } else {
      return wants("merge " + dump_json(merge), "\"left right\" or [\"left\", \"right\"]");
    }
  }
  return {};
}

Status read_added_tokens(const Json& tokenizer, int64_t vocab, TokenizerData& data) {
  const Json* added = find(tokenizer, "added_tokens");
  if (!added) return {};
  if (!added->is_array()) return wants("added_tokens is no list", "a list");
  for (const Json& token : *added) {
    DS_ASSIGN(const std::string text, get_string(token, "content"));
    const Json* id = find(token, "id");
    if (!id || text.empty()) return wants("added token without id or content", "both");
    for (const char* option : {"single_word", "lstrip", "rstrip"}) {
      if (is_set(token, option)) {
        return unsupported("tokenizer.json: added token \"" + text + "\" with " + option);
      }
    }
    DS_TRY(place_token(text, *id, vocab, data.tokens));
    DS_ASSIGN(const bool special, get_bool(token, "special", false));
    (special ? data.special : data.user_defined).push_back(id->get<int32_t>());
  }
  return {};
}

/// The id of e.g. "eos_token": by text in tokenizer_config.json (a string or {"content": text}),
/// else "eos_token_id" of config.json (an id or a list, whose first counts); -1 if neither has it.
Result<int32_t> special_id(std::string_view name, const TokenizerData& data,
                           const Json& tokenizer_config, const Json& config, int64_t vocab) {
  if (const Json* value = find(tokenizer_config, name)) {
    if (const Json* content = find(*value, "content")) value = content;
    if (!value->is_string()) {
      return invalid("tokenizer_config.json: " + std::string(name) + " is " + value->type_name() +
                     ", expected a string");
    }
    const auto& text = value->get_ref<const std::string&>();
    for (size_t id = 0; id < data.tokens.size(); ++id) {
      if (data.tokens[id] == text) return static_cast<int32_t>(id);
    }
    return invalid("tokenizer_config.json: " + std::string(name) + " \"" + text +
                   "\" is not in the vocabulary");
  }
  const std::string key = std::string(name) + "_id";
  const Json* value = find(config, key);
  if (value && value->is_array() && !value->empty()) value = &value->front();
  if (!value) return -1;
  if (!value->is_number_integer() || *value < -1 || *value >= vocab) {
    return invalid("config.json: " + key + " is " + dump_json(*value) + ", expected an id below " +
                   std::to_string(vocab));
  }
  return value->get<int32_t>();
}

/// A template is a string, or a list of named ones of which "default" counts.
Result<std::string> chat_template(const Json& tokenizer_config) {
  const Json* value = find(tokenizer_config, "chat_template");
  if (!value) return std::string();
  if (value->is_array()) {
    for (const Json& entry : *value) {
      DS_ASSIGN(const std::string name, get_string(entry, "name"));
      if (name == "default") return get_string(entry, "template");
    }
    return unsupported("tokenizer_config.json: chat_template without one named \"default\"");
  }
  return get_string(tokenizer_config, "chat_template");
}

}  // namespace

Result<TokenizerData> parse_hf_tokenizer(const Json& tokenizer, const Json& tokenizer_config,
                                         const Json& config, int64_t vocab) {
  const Json* model = find(tokenizer, "model");
  if (!model) return wants("no \"model\"", "a BPE model");
  DS_TRY(check_model(tokenizer, *model));
  TokenizerData data;
  DS_ASSIGN(data.pre_tokenizer, name_pre_tokenizer(tokenizer));
  const int64_t limit = id_limit(tokenizer, *model, vocab);
  DS_TRY(read_vocab(*model, limit, data));
  DS_TRY(read_merges(*model, data));
  DS_TRY(read_added_tokens(tokenizer, limit, data));
  DS_ASSIGN(data.bos, special_id("bos_token", data, tokenizer_config, config, vocab));
  DS_ASSIGN(data.eos, special_id("eos_token", data, tokenizer_config, config, vocab));
  DS_ASSIGN(data.pad, special_id("pad_token", data, tokenizer_config, config, vocab));
  DS_ASSIGN(data.unk, special_id("unk_token", data, tokenizer_config, config, vocab));
  DS_ASSIGN(data.chat_template, chat_template(tokenizer_config));
  return data;
}

}  // namespace ds
