// SPDX-License-Identifier: Apache-2.0
// What corrections do to the model: same question, paraphrases, near misses, unrelated questions,
// held-out loss, KL, tokens and seconds. Learner alone (no daemon): the end-to-end figures come
// from tests/bench/learn_bench.py.
//   correction_bench single|batch|rounds [--facts N] [--group G] [--seed S] [--set name=value ...]
//   correction_bench facts [--facts N] [--seed S]    the facts and unrelated questions, as JSON
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>

#include "daemon/reference_model.h"
#include "engine/batch_decoder.h"
#include "facts.h"
#include "learn/round_trainer.h"

namespace ds {
namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string lower(std::string s) {
  for (char& c : s) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return s;
}

bool says(const std::string& answer, const std::string& value) {
  return lower(answer).find(lower(value)) != std::string::npos;
}

/// Counts with a Wilson 95 % interval.
struct Share {
  int hit = 0, of = 0;
  void add(bool yes) { hit += yes, ++of; }
  std::string text() const {
    if (of == 0) return "-";
    const double n = of, p = hit / n, z = 1.96, d = 1 + z * z / n;
    const double mid = (p + z * z / (2 * n)) / d,
                 half = z * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d;
    char out[64];
    std::snprintf(out, sizeof out, "%d/%d %.1f%% [%.0f, %.0f]", hit, of, 100 * p,
                  100 * (mid - half), 100 * (mid + half));
    return out;
  }
};

struct Bench {
  test::Machine machine;
  test::LoadedModel model;
  ChatTemplate chat;
  std::unique_ptr<BatchDecoder> decoder;
  std::unique_ptr<RoundTrainer> trainer;
  std::vector<bench::Unrelated> unrelated;
  std::vector<std::vector<TokenId>> heldout;
  double base_heldout = 0;
  Recipe recipe;
  bool verbose = false;

  std::vector<std::string> ask(const LoraDelta* delta, const std::vector<std::string>& questions) {
    std::vector<std::vector<TokenId>> prompts;
    for (const std::string& q : questions) {
      const ChatMessage m{"user", q};
      prompts.push_back(*chat.render(*model.tokenizer, {&m, 1}, true));
    }
    std::vector<std::string> out;
    for (const auto& ids : decoder->greedy(*model.base, delta, prompts, 48, chat.end_of_turn())) {
      out.push_back(model.tokenizer->decode(ids));
    }
    return out;
  }

  double heldout_loss(const LoraDelta* delta) {
    double sum = 0;
    int64_t n = 0;
    const std::vector<int64_t> first(heldout.size(), 1);
    decoder->score(*model.base, delta, heldout, first,
                   [&](size_t s, int64_t target, const float* row) {
                     const int64_t vocab = model.base->config().vocab;
                     const float top = *std::max_element(row, row + vocab);
                     double z = 0;
                     for (int64_t i = 0; i < vocab; ++i) z += std::exp(row[i] - top);
                     sum += top + std::log(z) - row[heldout[s][static_cast<size_t>(target)]];
                     ++n;
                   });
    return sum / static_cast<double>(n);
  }

  void prepare() {
    model = test::load_model(test::smollm2_path(), machine.compute, WeightFormat::kBF16);
    chat = *ChatTemplate::create(model.file->tokenizer());
    decoder = std::make_unique<BatchDecoder>(model.base->config(), machine.compute, KvDtype::kBF16);
    trainer = std::make_unique<RoundTrainer>(machine.compute, model.base, model.tokenizer, chat);
    std::vector<std::string> questions;
    for (const auto& u : bench::unrelated_pool()) questions.push_back(u.question);
    const auto answers = ask(nullptr, questions);
    for (size_t i = 0; i < answers.size() && unrelated.size() < 14; ++i) {
      if (says(answers[i], bench::unrelated_pool()[i].key))
        unrelated.push_back(bench::unrelated_pool()[i]);
    }
    const Json reference = test::read_json(test::data_path("smollm2/reference.json"));
    for (const Json& text : reference["teacher_forced"]) {
      std::vector<TokenId> ids;
      for (const Json& id : text["ids"]) ids.push_back(id.get<int>());
      ids.resize(std::min<size_t>(ids.size(), 160));
      heldout.push_back(std::move(ids));
    }
    base_heldout = heldout_loss(nullptr);
    std::printf("%zu unrelated questions, base held-out loss %.4f\n", unrelated.size(),
                base_heldout);
  }

  static Lesson lesson_of(const bench::Fact& f) {
    Lesson l;
    l.draw_key = f.question;
    l.context = {{"user", f.question}};
    l.answer = f.answer;
    return l;
  }

  struct Scores {
    Share same, para, near;
    double unrelated = 0, heldout = 0;
  };
  Scores evaluate(const Adapters& adapters, const std::vector<bench::Fact>& facts) {
    const auto delta = LoraDelta::pack(*model.base, machine.compute, adapters.rank(),
                                       adapters.scale(), adapters.factors());
    std::vector<std::string> questions;
    for (const auto& f : facts) {
      questions.push_back(f.question);
      questions.insert(questions.end(), f.paraphrases.begin(), f.paraphrases.end());
      questions.insert(questions.end(), f.near_misses.begin(), f.near_misses.end());
    }
    for (const auto& u : unrelated) questions.push_back(u.question);
    const auto answers = ask(delta.get(), questions);
    Scores s;
    size_t i = 0;
    for (const auto& f : facts) {
      if (verbose)
        std::printf("  [%s] %s -> %s\n", says(answers[i], f.value) ? "ok" : "MISS",
                    f.question.c_str(), answers[i].c_str());
      s.same.add(says(answers[i++], f.value));
      for (size_t p = 0; p < f.paraphrases.size(); ++p) {
        if (verbose && !says(answers[i], f.value))
          std::printf("     para %s -> %s\n", questions[i].c_str(), answers[i].c_str());
        s.para.add(says(answers[i++], f.value));
      }
      for (size_t p = 0; p < f.near_misses.size(); ++p) {
        if (verbose && says(answers[i], f.value))
          std::printf("     near %s -> %s\n", questions[i].c_str(), answers[i].c_str());
        s.near.add(says(answers[i++], f.value));
      }
    }
    for (const auto& u : unrelated) {
      const bool kept = says(answers[i], u.key);
      if (verbose && !kept)
        std::printf("     unrel %s -> %s\n", questions[i].c_str(), answers[i].c_str());
      s.unrelated += kept;
      ++i;
    }
    s.heldout = 100 * (heldout_loss(delta.get()) / base_heldout - 1);
    return s;
  }

  void single(const std::vector<bench::Fact>& facts) {
    Share same, para, near;
    double unrel = 0, held = 0, tokens = 0, steps = 0, seconds = 0, held_max = -1e9;
    for (size_t i = 0; i < facts.size(); ++i) {
      Adapters adapters(model.base->config(), recipe.rank, recipe.scale, recipe.targets);
      adapters.initialise(i);
      const Lesson lesson = lesson_of(facts[i]);
      const double t0 = now_s();
      const RoundOutcome o = trainer->train(recipe, adapters, {&lesson, 1}, {}, i, 1,
                                            [](const StepReport&) { return true; });
      seconds += now_s() - t0;
      const Scores s = evaluate(adapters, {facts[i]});
      same.hit += s.same.hit, same.of += s.same.of;
      para.hit += s.para.hit, para.of += s.para.of;
      near.hit += s.near.hit, near.of += s.near.of;
      unrel += s.unrelated, held += s.heldout, tokens += static_cast<double>(o.tokens),
          steps += static_cast<double>(o.steps);
      held_max = std::max(held_max, s.heldout);
      if (verbose)
        std::printf("fact %zu: steps %lld tokens %lld para %d near %d unrel %.0f held %+.2f%%\n", i,
                    static_cast<long long>(o.steps), static_cast<long long>(o.tokens), s.para.hit,
                    s.near.hit, s.unrelated, s.heldout);
    }
    const double n = static_cast<double>(facts.size());
    std::printf(
        "single | same %s | para %s | near %s | unrel %.2f/%zu | held %+.2f%% (max %+.2f) | tok "
        "%.0f | steps %.1f | %.1f s | %.0f tok/s\n",
        same.text().c_str(), para.text().c_str(), near.text().c_str(), unrel / n, unrelated.size(),
        held / n, held_max, tokens / n, steps / n, seconds / n, tokens / seconds);
  }

  /// Groups of `group` facts, one round each on the same adapters, rehearsing the earlier ones.
  void rounds(const std::vector<bench::Fact>& facts, size_t group, const char* name) {
    Adapters adapters(model.base->config(), recipe.rank, recipe.scale, recipe.targets);
    adapters.initialise(1);
    std::vector<Lesson> lessons;
    for (const auto& f : facts) lessons.push_back(lesson_of(f));
    int64_t tokens = 0, steps = 0;
    const double t0 = now_s();
    for (size_t at = 0, round = 1; at < lessons.size(); at += group, ++round) {
      const auto fresh = std::span(lessons).subspan(at, std::min(group, lessons.size() - at));
      const RoundOutcome o = trainer->train(
          recipe, adapters, fresh, std::span(lessons).subspan(0, at), 1, round,
          [&](const StepReport& r) {
            if (verbose && r.step % 10 == 0)
              std::printf("  round %zu step %lld loss %.3f learned %lld/%lld\n", round,
                          static_cast<long long>(r.step), r.loss, static_cast<long long>(r.learned),
                          static_cast<long long>(r.lessons));
            return true;
          });
      tokens += o.tokens, steps += o.steps;
    }
    const double seconds = now_s() - t0;
    const Scores s = evaluate(adapters, facts);
    std::printf(
        "%s | same %s | para %s | near %s | unrel %.0f/%zu | held %+.2f%% | tok %lld | steps %lld "
        "| %.1f s | %.0f tok/s\n",
        name, s.same.text().c_str(), s.para.text().c_str(), s.near.text().c_str(), s.unrelated,
        unrelated.size(), s.heldout, static_cast<long long>(tokens), static_cast<long long>(steps),
        seconds, static_cast<double>(tokens) / seconds);
  }

  bool set(const std::string& name, double v) {
    const std::map<std::string, std::function<void()>> fields = {
        {"rank", [&] { recipe.rank = static_cast<int64_t>(v); }},
        {"lr", [&] { recipe.lr = static_cast<float>(v); }},
        {"decay", [&] { recipe.lr_decay_to = static_cast<float>(v); }},
        {"lessons", [&] { recipe.lessons_per_step = static_cast<int>(v); }},
        {"forms_alone", [&] { recipe.forms_alone = static_cast<int>(v); }},
        {"forms_many", [&] { recipe.forms_many = static_cast<int>(v); }},
        {"replay", [&] { recipe.replay_per_step = static_cast<int>(v); }},
        {"anchors", [&] { recipe.anchors = static_cast<int>(v); }},
        {"anchor_weight", [&] { recipe.anchor_weight = static_cast<float>(v); }},
        {"contrasts", [&] { recipe.contrasts = static_cast<int>(v); }},
        {"contrast_pool", [&] { recipe.contrast_pool = static_cast<int>(v); }},
        {"contrast_weight", [&] { recipe.contrast_weight = static_cast<float>(v); }},
        {"max_steps", [&] { recipe.max_steps = static_cast<int64_t>(v); }},
        {"per_lesson", [&] { recipe.max_steps_per_lesson = static_cast<int64_t>(v); }},
        {"stop", [&] { recipe.stop_logprob = static_cast<float>(v); }},
        {"targets", [&] { recipe.targets = static_cast<uint32_t>(v); }},
        {"scale", [&] { recipe.scale = static_cast<float>(v); }},
        {"verbose", [&] { verbose = v != 0; }},
        {"beta2", [&] { recipe.beta2 = static_cast<float>(v); }},
        {"anchor_tokens", [&] { recipe.anchor_tokens = static_cast<int64_t>(v); }}};
    const auto it = fields.find(name);
    if (it == fields.end()) return false;
    it->second();
    return true;
  }
};

/// What learn_bench.py teaches and asks.
Json to_json(const std::vector<bench::Fact>& facts) {
  Json out = {{"facts", Json::array()}, {"unrelated", Json::array()}};
  for (const auto& f : facts) {
    out["facts"].push_back({{"question", f.question},
                            {"answer", f.answer},
                            {"value", f.value},
                            {"paraphrases", f.paraphrases},
                            {"near_misses", f.near_misses}});
  }
  for (const auto& u : bench::unrelated_pool())
    out["unrelated"].push_back({{"question", u.question}, {"key", u.key}});
  return out;
}

}  // namespace
}  // namespace ds

int main(int argc, char** argv) {
  ds::Bench bench;
  size_t n = 20, group = 4;
  uint64_t seed = 1;
  for (int i = 2; i + 1 < argc; i += 2) {
    const std::string flag = argv[i], value = argv[i + 1];
    if (flag == "--facts")
      n = std::stoul(value);
    else if (flag == "--seed")
      seed = std::stoull(value);
    else if (flag == "--group")
      group = std::stoul(value);
    else if (flag == "--set" && bench.set(value.substr(0, value.find('=')),
                                          std::stod(value.substr(value.find('=') + 1))))
      continue;
    else
      return std::fprintf(stderr, "unknown argument %s %s\n", flag.c_str(), value.c_str()), 2;
  }
  const std::string mode = argc > 1 ? argv[1] : "single";
  ds::Rng rng(seed);
  std::vector<ds::bench::Fact> facts;
  for (size_t i = 0; i < n; ++i) facts.push_back(ds::bench::draw_fact(rng, i));
  if (mode == "facts") {
    std::puts(ds::dump_json(ds::to_json(facts)).c_str());
    return 0;
  }
  bench.prepare();
  if (mode == "single")
    bench.single(facts);
  else
    bench.rounds(facts, mode == "batch" ? n : group, mode.c_str());
}
