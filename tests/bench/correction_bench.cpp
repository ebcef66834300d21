// SPDX-License-Identifier: Apache-2.0
// What corrections do to the model: same question, paraphrases, near misses, unrelated questions,
// held-out loss, KL, tokens and seconds. Learner alone (no daemon): the end-to-end figures come
// from tests/bench/learn_bench.py.
//   correction_bench single|batch|rounds [--facts N] [--group G] [--seed S] [--set name=value ...]
//                    [--learner NAME] [--config JSON]    a learner plugin and its config
//   correction_bench facts [--facts N] [--seed S]    the facts and unrelated questions, as JSON
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <optional>

#include "daemon/learner_module.h"
#include "engine/batch_decoder.h"
#include "facts.h"
#include "learn/round_trainer.h"
#include "tests/bench/texts.h"

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
  void add(const Share& other) { hit += other.hit, of += other.of; }
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
  std::unique_ptr<TrainGraph> graph;
  std::vector<Sequence> kept;           // the unrelated questions with the base's first words
  std::vector<StoredTopK> kept_stored;  // and what it thought of them
  std::vector<std::vector<TokenId>> heldout;
  double base_heldout = 0;
  Recipe recipe;
  std::string learner_name = "kl-to-base";
  Json learner_config = Json::object();
  std::optional<LearnerPlugin> learner;
  bool verbose = false;

  std::vector<std::string> ask(const LoraDelta* delta, const std::vector<std::string>& questions) {
    std::vector<std::vector<TokenId>> prompts;
    for (const std::string& q : questions) {
      const ChatMessage m{"user", q};
      prompts.push_back(*chat.render(*model.tokenizer, {&m, 1}, true));
    }
    std::vector<std::string> out;
    const auto decoded = decoder->greedy(*model.base, delta, prompts, 48, chat.end_of_turn());
    DS_CHECK(decoded.ok());
    for (const auto& ids : *decoded) {
      out.push_back(model.tokenizer->decode(ids));
    }
    return out;
  }

  double heldout_loss(const LoraDelta* delta) {
    double sum = 0;
    int64_t n = 0;
    const std::vector<int64_t> first(heldout.size(), 1);
    const Status scored = decoder->score(
        *model.base, delta, heldout, first, [&](size_t s, int64_t target, const float* row) {
          const int64_t vocab = model.base->config().vocab;
          const float top = *std::max_element(row, row + vocab);
          double z = 0;
          for (int64_t i = 0; i < vocab; ++i) z += std::exp(row[i] - top);
          sum += top + std::log(z) - row[heldout[s][static_cast<size_t>(target)]];
          ++n;
        });
    DS_CHECK(scored.ok());
    return sum / static_cast<double>(n);
  }

  /// Mean KL(base || tuned) on the base's answers to the unrelated questions, nats/token: moves
  /// long before an answer flips.
  double drift(Adapters& adapters) {
    DS_CHECK(adapters.pack(graph->formats(*model.base)).ok());
    double sum = 0;
    for (size_t i = 0; i < kept.size(); ++i) {
      Terms one;
      one.kl.push_back({&kept[i], &kept_stored[i], 1.0f});
      sum += run_terms(*graph, machine.compute, *model.base, &adapters, nullptr, one, false).kl;
    }
    return sum / static_cast<double>(kept.size());
  }

  /// The questions of the pool that the base answers right, and its words.
  void choose_unrelated() {
    std::vector<std::string> questions;
    for (const auto& u : bench::unrelated_pool()) questions.push_back(u.question);
    const auto answers = ask(nullptr, questions);
    for (size_t i = 0; i < answers.size(); ++i) {
      if (!says(answers[i], bench::unrelated_pool()[i].key)) continue;
      unrelated.push_back(bench::unrelated_pool()[i]);
      const ChatMessage message{"user", questions[i]};
      kept.push_back(trainer->sequence_of({&message, 1}, answers[i]));
      auto& ids = kept.back().ids;
      ids.resize(std::min(ids.size(), static_cast<size_t>(kept.back().first_target) + 12));
    }
    graph = std::make_unique<TrainGraph>(model.base->config(), machine.compute);
    std::vector<const Sequence*> sequences;
    for (const Sequence& s : kept) sequences.push_back(&s);
    kept_stored = store_top_k(*graph, *model.base, nullptr, sequences, model.base->config().vocab);
  }

  void prepare() {
    if (!learner_config.empty())
      DS_CHECK(test::modules().reload(learner_name, "", learner_config).ok());
    learner = test::learner_module(learner_name);
    model = test::load_model(test::smollm2_path(), machine.compute, WeightFormat::kBF16);
    chat = *ChatTemplate::create(model.file->tokenizer());
    decoder = std::make_unique<BatchDecoder>(model.base->config(), machine.compute, KvDtype::kBF16);
    trainer = std::make_unique<RoundTrainer>(machine.compute, model.base, model.tokenizer, chat);
    choose_unrelated();
    for (std::vector<TokenId>& ids : reference_texts()) {
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
    Share unrelated;
    double heldout = 0, drift = 0;
  };
  Scores evaluate(Adapters& adapters, const std::vector<bench::Fact>& facts) {
    const auto delta = *LoraDelta::pack(*model.base, machine.compute, adapters.rank(),
                                        adapters.scale(), *adapters.factors());
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
      s.unrelated.add(kept);
      ++i;
    }
    s.drift = drift(adapters);
    s.heldout = 100 * (heldout_loss(delta.get()) / base_heldout - 1);
    return s;
  }

  /// Sums over evaluations, printed as one line.
  struct Total {
    Share same, para, near, unrelated;
    double heldout = 0, heldout_max = -1e9, drift = 0, seconds = 0;
    int64_t evaluations = 0, tokens = 0, steps = 0;

    void add(const Scores& s) {
      same.add(s.same), para.add(s.para), near.add(s.near), unrelated.add(s.unrelated);
      heldout += s.heldout, heldout_max = std::max(heldout_max, s.heldout), drift += s.drift;
      ++evaluations;
    }
    void print(const char* name) const {
      const auto n = static_cast<double>(evaluations);
      std::printf(
          "%s | same %s | para %s | near %s | unrelated kept %s, %.2f of 14 | held-out %+.2f%% "
          "(max "
          "%+.2f) | drift %.4f | %.0f tokens, %.1f steps, %.1f s each | %.0f tok/s\n",
          name, same.text().c_str(), para.text().c_str(), near.text().c_str(),
          unrelated.text().c_str(), 14.0 * unrelated.hit / unrelated.of, heldout / n, heldout_max,
          drift / n, static_cast<double>(tokens) / n, static_cast<double>(steps) / n, seconds / n,
          static_cast<double>(tokens) / seconds);
    }
  };

  /// One round on `adapters`, counted in `total`.
  void train(Adapters& adapters, std::span<const Lesson> fresh, std::span<const Lesson> replay,
             uint64_t seed, uint64_t round, Total& total) {
    const double started = now_s();
    const RoundOutcome o = trainer->train(
        recipe, *learner, adapters, {fresh, replay, seed, round}, [&](const StepReport& r) {
          if (verbose && r.step % 10 == 0)
            std::printf("  round %d step %d loss %.3f learned %d/%d\n", static_cast<int>(round),
                        static_cast<int>(r.step), r.loss, static_cast<int>(r.learned),
                        static_cast<int>(r.lessons));
          return true;
        });
    if (!o.failure.ok()) std::printf("failed: %s\n", o.failure.message().c_str());
    total.seconds += now_s() - started;
    total.tokens += o.tokens, total.steps += o.steps;
  }

  std::unique_ptr<Adapters> fresh_adapters(uint64_t seed) const {
    auto out = Adapters::make(machine.compute, model.base->config(), recipe.rank, recipe.scale,
                              recipe.targets)
                   .value();
    out->initialise(seed);
    return out;
  }

  /// Each fact alone, from the base.
  void single(const std::vector<bench::Fact>& facts) {
    Total total;
    for (size_t i = 0; i < facts.size(); ++i) {
      const auto made = fresh_adapters(i);
      Adapters& adapters = *made;
      const Lesson lesson = lesson_of(facts[i]);
      Total one;
      train(adapters, {&lesson, 1}, {}, i, 1, one);
      const Scores s = evaluate(adapters, {facts[i]});
      one.add(s), total.add(s);
      total.seconds += one.seconds, total.tokens += one.tokens, total.steps += one.steps;
      if (verbose) one.print("fact");
    }
    total.print("single");
  }

  /// Groups of `group` facts, one round each on the same adapters, rehearsing the earlier ones.
  void rounds(const std::vector<bench::Fact>& facts, size_t group, const char* name) {
    const auto made = fresh_adapters(1);
    Adapters& adapters = *made;
    std::vector<Lesson> lessons;
    for (const auto& f : facts) lessons.push_back(lesson_of(f));
    Total total;
    for (size_t at = 0, round = 1; at < lessons.size(); at += group, ++round) {
      const auto fresh = std::span(lessons).subspan(at, std::min(group, lessons.size() - at));
      train(adapters, fresh, std::span(lessons).subspan(0, at), 1, round, total);
    }
    total.add(evaluate(adapters, facts));
    total.print(name);
  }

  bool set(const std::string& name, double v) {
    const std::map<std::string, std::function<void()>> fields = {
        {"rank", [&] { recipe.rank = static_cast<int64_t>(v); }},
        {"lr", [&] { recipe.lr = static_cast<float>(v); }},
        {"decay", [&] { recipe.lr_decay_to = static_cast<float>(v); }},
        {"decay_steps", [&] { recipe.lr_decay_steps = static_cast<int64_t>(v); }},
        {"plain", [&] { recipe.plain_share = static_cast<float>(v); }},
        {"sightings", [&] { recipe.sightings = static_cast<int>(v); }},
        {"replay", [&] { recipe.replay_ratio = static_cast<float>(v); }},
        {"contrast_pool", [&] { recipe.contrast_pool = static_cast<int>(v); }},
        {"max_steps", [&] { recipe.max_steps = static_cast<int64_t>(v); }},
        {"per_lesson", [&] { recipe.max_steps_per_lesson = static_cast<int64_t>(v); }},
        {"stop", [&] { recipe.stop_logprob = static_cast<float>(v); }},
        {"targets", [&] { recipe.targets = static_cast<uint32_t>(v); }},
        {"scale", [&] { recipe.scale = static_cast<float>(v); }},
        {"verbose", [&] { verbose = v != 0; }},
        {"beta2", [&] { recipe.beta2 = static_cast<float>(v); }},
        {"anchor_tokens", [&] { recipe.anchor_tokens = static_cast<int64_t>(v); }}};
    const auto it = fields.find(name);
    if (it != fields.end()) it->second();
    return it != fields.end();
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
  const std::string mode = argc > 1 ? argv[1] : "single";
  bench.recipe = mode == "single" ? ds::single_recipe() : ds::group_recipe();
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
    else if (flag == "--learner")
      bench.learner_name = value;
    else if (flag == "--config")
      bench.learner_config = *ds::parse_json(value);
    else if (flag == "--set" && bench.set(value.substr(0, value.find('=')),
                                          std::stod(value.substr(value.find('=') + 1))))
      continue;
    else
      return std::fprintf(stderr, "unknown argument %s %s\n", flag.c_str(), value.c_str()), 2;
  }
  ds::Rng rng(seed);
  std::vector<ds::bench::Fact> facts;
  for (size_t i = 0; i < n; ++i) facts.push_back(ds::bench::draw_fact(rng, i));
  if (mode == "facts") {
    std::puts(ds::dump_json(ds::to_json(facts)).c_str());
    return 0;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  bench.prepare();
  if (mode == "single")
    bench.single(facts);
  else
    bench.rounds(facts, mode == "batch" ? n : group, mode.c_str());
}
