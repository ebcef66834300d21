// SPDX-License-Identifier: Apache-2.0
// Ids of the real vocabulary against Hugging Face transformers and tokenizers.
#include <gtest/gtest.h>

#include <cstdlib>

#include "engine/tokenizer.h"
#include "storage/json.h"
#include "storage/seams.h"

namespace ds {
namespace {

std::string model_path() {
  if (const char* path = std::getenv("DS_MODEL")) return path;
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  const std::string base = cache ? cache : std::string(home ? home : "") + "/.cache";
  return base +
         "/driftstone/b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53/"
         "SmolLM2-135M-Instruct.Q4_1.gguf";
}

Json reference(const std::string& name) {
  const std::string path = DS_TEST_DATA "/smollm2/" + name;
  return parse_json(posix_file_system().read(path).value()).value();
}

class SmolLm2 : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto file = ModelFile::open(model_path());
    ASSERT_TRUE(file.ok()) << file.status().message();
    data_ = (*file)->tokenizer();
    auto tokenizer = Tokenizer::create(data_);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
    tokenizer_ = *tokenizer;
  }
  void SetUp() override { ASSERT_NE(tokenizer_, nullptr); }

  static inline TokenizerData data_;
  static inline std::shared_ptr<const Tokenizer> tokenizer_;
};

TEST_F(SmolLm2, IdsEqualThoseOfTransformers) {
  size_t strings = 0;
  for (const char* name : {"reference.json", "tokenizer-extra.json"}) {
    const Json file = reference(name);
    for (const Json& entry : file["tokenizer"]) {
      const auto text = entry["text"].get<std::string>();
      EXPECT_EQ(tokenizer_->encode(text, true), entry["ids"].get<std::vector<TokenId>>())
          << dump_json(entry["text"]);
      ++strings;
    }
  }
  EXPECT_EQ(strings, 320u);
}

TEST_F(SmolLm2, ChatPromptsEqualThoseOfTransformers) {
  const auto chat = ChatTemplate::create(data_);
  ASSERT_TRUE(chat.ok()) << chat.status().message();
  size_t prompts = 0;
  const Json file = reference("reference.json");
  for (const Json& entry : file["greedy_chat"]) {
    const std::vector<ChatMessage> messages{{"user", entry["question"].get<std::string>()}};
    const auto ids = chat->render(*tokenizer_, messages, true);
    ASSERT_TRUE(ids.ok()) << ids.status().message();
    EXPECT_EQ(*ids, entry["prompt_ids"].get<std::vector<TokenId>>());
    auto answer = entry["ids"].get<std::vector<TokenId>>();
    if (answer.back() == tokenizer_->eos()) answer.pop_back();  // else cut at the length limit
    EXPECT_EQ(tokenizer_->decode(answer), entry["text"].get<std::string>());
    ++prompts;
  }
  EXPECT_GE(prompts, 6u);
}

}  // namespace
}  // namespace ds
