// SPDX-License-Identifier: Apache-2.0
// Inside of the engine: live sequences, the queues before them, and the plan of one step. Only
// engine*.cpp include this.
//
// Threads: `mutex` guards live, waiting and the flags. `running`, the step's workspace and the
// parts of a LiveSequence below "engine thread" belong to the engine thread once a sequence is
// queued.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "engine/engine.h"
#include "engine/kv_cache.h"

namespace ds {

using OnEmbedding = std::function<void(Status, std::vector<float>, std::string version)>;

constexpr double kRateSeconds = 5.0;  ///< smoothing of tokens per second

struct LiveSequence {
  explicit LiveSequence(GenerateRequest r) : request(std::move(r)), answer(request.stop) {}

  // Constant after submission.
  GenerateRequest request;  ///< its prompt has moved to `tokens`
  OnChunk on_chunk;
  OnFinish on_finish;
  OnEmbedding on_embedding;  ///< set: mean hidden state instead of text
  std::shared_ptr<const Weights> weights;
  std::shared_ptr<const Components> components;  ///< the generations that it began with
  uint64_t execution_id = 0;                     ///< key of its KV pages
  int64_t arrival = 0;                           ///< order of submission; smaller = older
  int64_t prompt_count = 0;
  int64_t token_limit = 0;  ///< prompt and answer together
  int64_t submitted_ns = 0;

  // Any thread.
  std::atomic<bool> cancelled{false};
  std::atomic<bool> is_running{false};
  std::atomic<int64_t> generated{0};
  std::atomic<int64_t> first_token_ns{0};  ///< 0 = none yet

  // Engine thread.
  std::vector<TokenId> tokens;  ///< prompt and answer
  std::vector<int32_t> pages;
  int64_t computed = 0;  ///< leading tokens whose K/V are in `pages`
  int64_t reserved_pages = 0;
  int64_t cached_count = 0;
  int64_t started_ns = 0;  ///< first admission; 0 = not yet
  int64_t last_token_ns = 0;
  TokenCounts counts;
  Answer answer;
  std::vector<TokenInfo> prompt_tokens;
  std::vector<double> hidden_sum;  ///< [d_model]
  Status failure;
  std::string finish_reason;  ///< not empty, or failure not OK: over

  bool over() const { return !finish_reason.empty() || !failure.ok(); }
  int64_t remaining() const { return static_cast<int64_t>(tokens.size()) - computed; }
  int64_t cls() const { return static_cast<int64_t>(request.latency); }
  bool penalised() const {
    return request.sampling.presence_penalty != 0 || request.sampling.frequency_penalty != 0;
  }
  /// Prompt tokens still without their entry; 0 when nobody asked.
  bool scores_prompt() const {
    return request.prompt_logprobs && static_cast<int64_t>(prompt_tokens.size()) < prompt_count;
  }
  /// Every prompt position must pass through the model: a cached prefix has no logits or hidden
  /// states.
  bool needs_all_rows() const { return on_embedding != nullptr || scores_prompt(); }
};

/// Rows of one sequence in one step: tokens [computed, computed + rows).
struct PlannedRows {
  LiveSequence* sequence = nullptr;
  int64_t rows = 0;
};

/// One logits row and what becomes of it.
struct LogitUse {
  LiveSequence* sequence = nullptr;
  int64_t position = 0;      ///< of the row's token; its logits speak of position + 1
  bool samples = false;      ///< false: scores the prompt token at position + 1
  int32_t row = 0;           ///< of the step
  std::optional<Draw> draw;  ///< the backend takes the token, and the logits stay there
  TokenId token = 0;         ///< outcome from here on
  Logprobs scores;
  Status status;
};

/// One call of Forward: sequences on one base and components with at most kMaxLoraSlots distinct
/// deltas.
struct Run {
  const BaseWeights* base = nullptr;
  const Components* components = nullptr;
  std::vector<const LoraDelta*> deltas;
  std::vector<PlannedRows> items;
};

/// Where steps compute, and what of theirs is in its memory. Replaced as a whole when a GPU fails.
struct StepPlace {
  StepPlace(const ModelConfig& config, const EngineOptions& options, const Compute& compute,
            int64_t kv_pages);
  /// Takes all memory that it can be known to need; kResource where there is not enough.
  Status reserve();

  Compute compute;
  KvCache cache;
  KvPages pages;
  Forward forward;
  Buffer logits;  ///< [max rows, vocab]; pages the kernel never touched cost nothing
  Buffer tokens;  ///< [max rows] that the backend drew
  size_t logits_bytes;
};

struct EngineMetrics {
  explicit EngineMetrics(Metrics& metrics);
  struct PerClass {
    Histogram *queue, *first_token, *inter_token, *request;
  };
  PerClass per_class[2];
  Gauge *running, *waiting, *pages_held, *pages_cached, *pages_free;
  Counter *prompt_tokens, *generated_tokens, *prefix_hits, *preemptions;
};

struct Engine::State {
  State(EngineOptions options, const Compute& compute, Pool& pool, Versions& versions,
        std::shared_ptr<const Tokenizer> tokenizer, Metrics& metrics, Clock& clock);

  // engine.cpp: any thread
  Status check(const GenerateRequest& request, std::span<const TokenId> prompt,
               const Weights& weights) const;
  Status enqueue(std::unique_ptr<LiveSequence> sequence);
  void cancel_all();  ///< mutex held

  // engine_loop.cpp: engine thread
  void loop();
  std::vector<LiveSequence*> take_cancelled();  ///< mutex held
  void admit();                                 ///< mutex held
  bool fits(int64_t need_pages) const;
  void start(LiveSequence& sequence, int64_t need_pages);
  void preempt(LiveSequence& sequence);
  void publish_pages(LiveSequence& sequence);
  void give_back_pages(LiveSequence& sequence);
  void finish(LiveSequence& sequence);
  void report(LiveSequence& sequence);
  void report_embedding(const LiveSequence& sequence);
  void set_gauges();  ///< mutex held
  std::deque<LiveSequence*>& queue_of(const LiveSequence& s) { return waiting[s.cls()]; }
  int64_t waiting_count() const { return std::ssize(waiting[0]) + std::ssize(waiting[1]); }

  // engine_place.cpp: engine thread, but for the first call of settle_down()
  void settle_down(const Compute& compute);
  void move_to_host();

  // engine_step.cpp: engine thread
  void step();
  void plan();
  void plan_pages();
  LiveSequence* victim() const;
  void group_runs();
  Status run(const Run& run);
  bool go_on_after(const Status& failure, const Run& run);
  void list_logits(const PlannedRows& item, int64_t row0);
  std::optional<Draw> drawn_there(const LiveSequence& sequence, int64_t position) const;
  void order_uses();
  void judge_logits();
  void judge(LogitUse& use, std::span<const float> logits, SampleScratch& scratch) const;
  void apply(LogitUse& use, int64_t now_ns);
  void accept_token(LiveSequence& sequence, LogitUse& use, int64_t now_ns);
  void add_hidden(const PlannedRows& item, int64_t row0);
  void settle(const PlannedRows& item);
  void deliver();

  EngineOptions options;
  const Compute host;  ///< the CPU, for when there is no other
  Pool& pool;
  Versions& versions;
  const std::shared_ptr<const Tokenizer> tokenizer;
  Clock& clock;
  const ModelConfig config;
  EngineMetrics metrics;
  std::unique_ptr<StepPlace> place;
  std::atomic<int64_t> kv_total{0};  ///< pages of `place`

  mutable std::mutex mutex;
  std::condition_variable wake;                               ///< to the engine thread
  std::condition_variable idle;                               ///< nothing is live
  std::map<std::string, std::unique_ptr<LiveSequence>> live;  ///< by request id
  std::deque<LiveSequence*> waiting[2];                       ///< by class
  std::vector<LiveSequence*> running;                         ///< oldest first
  bool draining = false, stopping = false, any_cancelled = false;
  bool leave_device = false;  ///< it failed, says somebody else
  bool on_host = false;       ///< `place` is the CPU's in place of a device that was lost
  bool reporting = false;     ///< an ended sequence's callback is running
  int64_t next_arrival = 1;

  // Workspace of a step; kept so that a steady state does not allocate.
  std::vector<PlannedRows> planned;
  std::vector<Run> runs;
  size_t n_runs = 0;
  std::vector<TokenId> ids;
  std::vector<SequenceSpan> spans;
  std::vector<int32_t> slots, logit_rows;
  std::vector<LogitUse> uses;  ///< those with a draw last
  std::vector<Draw> draws;
  std::vector<SampleScratch> scratch;  ///< one per sampling task
  int64_t row_limit = 0;               ///< of a step; small for a while after it found no memory
  std::vector<float> hidden;           ///< [max rows, d_model] once an embedding was asked for

  std::atomic<double> rate{0};  ///< tokens per second at rate_ns, smoothed over some seconds
  std::atomic<int64_t> rate_ns{0};
  std::thread thread;
};

}  // namespace ds
