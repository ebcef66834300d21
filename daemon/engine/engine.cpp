// SPDX-License-Identifier: Apache-2.0
// The engine as other threads see it: submission, cancellation, draining, numbers.
#include "engine/engine.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "engine/engine_state.h"

namespace ds {
namespace {

const char* class_name(LatencyClass latency) {
  return latency == LatencyClass::kInteractive ? "interactive" : "batch";
}

EngineOptions settled(EngineOptions o, const ModelConfig& config) {
  o.context = std::clamp<int64_t>(o.context, 1, config.context);
  o.max_running = std::max<int64_t>(o.max_running, 1);
  o.max_waiting = std::max<int64_t>(o.max_waiting, 1);
  o.prefill_chunk = std::max<int64_t>(o.prefill_chunk, 1);
  // One full context always fits, so the oldest sequence can always go on.
  const int64_t one = pages_for(o.context);
  if (o.kv_pages == 0) o.kv_pages = one * (o.max_running / 4);
  o.kv_pages = std::max(o.kv_pages, one);
  return o;
}

std::vector<TokenId> joined(const std::vector<Segment>& segments) {
  std::vector<TokenId> ids;
  for (const Segment& segment : segments)
    ids.insert(ids.end(), segment.ids.begin(), segment.ids.end());
  return ids;
}

bool same_shape(const ModelConfig& a, const ModelConfig& b) {
  return a.n_layers == b.n_layers && a.d_model == b.d_model && a.d_ff == b.d_ff &&
         a.vocab == b.vocab && a.n_heads == b.n_heads && a.n_kv_heads == b.n_kv_heads &&
         a.head_dim == b.head_dim;
}

}  // namespace

EngineMetrics::EngineMetrics(Metrics& m) {
  for (const LatencyClass latency : {LatencyClass::kInteractive, LatencyClass::kBatch}) {
    const Labels labels = {{"class", class_name(latency)}};
    const std::vector<double> token = {0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1,
                                       0.15,  0.2,   0.3,  0.5,  1,    2,    5};
    per_class[static_cast<int>(latency)] = {
        &m.histogram("ds_serve_queue_seconds", "Time from submission to the first step", labels),
        &m.histogram("ds_serve_time_to_first_token_seconds",
                     "Time from submission to the first token", labels),
        &m.histogram("ds_serve_inter_token_seconds", "Time between two tokens of a sequence",
                     labels, token),
        &m.histogram("ds_serve_request_seconds", "Time from submission to the end", labels)};
  }
  running = &m.gauge("ds_serve_running_requests", "Sequences that are prefilling or decoding");
  waiting = &m.gauge("ds_serve_waiting_requests", "Requests not yet started, or set back");
  const auto state = [&](const char* value) {
    return &m.gauge("ds_kv_pages", "KV pages of 32 tokens by state", {{"state", value}});
  };
  pages_held = state("held");
  pages_cached = state("cached");
  pages_free = state("free");
  prompt_tokens = &m.counter("ds_serve_prompt_tokens_total", "Prompt tokens of started requests");
  generated_tokens = &m.counter("ds_serve_generated_tokens_total", "Tokens sampled");
  prefix_hits = &m.counter("ds_kv_prefix_hits_total", "KV pages reused instead of recomputed");
  preemptions = &m.counter("ds_serve_preemptions_total", "Sequences set back for want of KV pages");
}

Engine::State::State(EngineOptions o, const Compute& c, Pool& p, Versions& v,
                     std::shared_ptr<const Tokenizer> t, Metrics& m, Clock& k)
    : options(settled(o, v.current()->base->config())),
      host{&host_ops(c), {p.engine()}, c.components, c.device},
      pool(p),
      versions(v),
      tokenizer(std::move(t)),
      clock(k),
      config(v.current()->base->config()),
      metrics(m),
      scratch(static_cast<size_t>(p.threads())) {
  settle_down({c.ops, {p.engine(), c.context.stream, c.context.device}, c.components, c.device});
}

Engine::Engine(EngineOptions options, const Compute& compute, Pool& pool, Versions& versions,
               std::shared_ptr<const Tokenizer> tokenizer, Metrics& metrics, Clock& clock)
    : state_(std::make_unique<State>(options, compute, pool, versions, std::move(tokenizer),
                                     metrics, clock)) {
  state_->thread = std::thread([state = state_.get()] {
    pthread_setname_np(pthread_self(), "ds-engine");
    state->loop();
  });
}

Engine::~Engine() {
  {
    std::lock_guard lock(state_->mutex);
    state_->draining = state_->stopping = true;
    state_->cancel_all();
  }
  state_->wake.notify_one();
  state_->thread.join();
}

Status Engine::State::check(const GenerateRequest& r, std::span<const TokenId> prompt,
                            const Weights& weights) const {
  if (!same_shape(weights.base->config(), config)) {
    return unsupported("version " + weights.version +
                       ": its base has another shape than the one served");
  }
  if (r.id.empty()) return invalid("request without id");
  if (prompt.empty()) return invalid("prompt: empty, expected at least one token");
  for (const TokenId id : prompt) {
    if (id < 0 || id >= config.vocab) {
      return invalid("prompt: token " + std::to_string(id) + ", expected 0 .. " +
                     std::to_string(config.vocab - 1));
    }
  }
  if (r.max_tokens < -1) {
    return invalid("max_tokens: " + std::to_string(r.max_tokens) + ", expected 0 or more, or -1");
  }
  const int64_t room = options.context - (r.max_tokens == 0 ? 0 : 1);
  if (std::ssize(prompt) > room) {
    return invalid("prompt: " + std::to_string(prompt.size()) + " tokens, at most " +
                   std::to_string(room) + " fit the context of " + std::to_string(options.context));
  }
  if (r.logprobs < -1 || r.logprobs > kMaxLogprobs) {
    return invalid("logprobs: " + std::to_string(r.logprobs) + ", expected 0 .. " +
                   std::to_string(kMaxLogprobs));
  }
  for (const std::string& stop : r.stop) {
    if (stop.empty()) return invalid("stop: empty string, expected at least one character");
  }
  return check_sampling(r.sampling, config.vocab);
}

Status Engine::State::enqueue(std::unique_ptr<LiveSequence> sequence) {
  {
    std::lock_guard lock(mutex);
    if (draining) return unavailable("engine: shutting down");
    if (waiting_count() >= options.max_waiting) {
      return busy("engine: " + std::to_string(waiting_count()) + " requests wait, the limit is " +
                  std::to_string(options.max_waiting));
    }
    LiveSequence* s = sequence.get();
    if (on_host) s->weights = ds::on_host(s->weights);
    s->components = host.components->current();
    s->execution_id = Rng::mix(s->weights->execution_id, s->components->key());
    if (!live.emplace(s->request.id, std::move(sequence)).second) {
      return conflict("request " + s->request.id + ": the id is in use");
    }
    s->arrival = next_arrival++;
    s->submitted_ns = clock.monotonic_ns();
    queue_of(*s).push_back(s);
    metrics.waiting->set(static_cast<double>(waiting_count()));
  }
  wake.notify_one();
  return {};
}

Status Engine::submit(GenerateRequest request, OnChunk on_chunk, OnFinish on_finish) {
  DS_ASSIGN(auto weights, state_->versions.find(request.model));
  std::vector<TokenId> prompt = joined(request.prompt);
  DS_TRY(state_->check(request, prompt, *weights));
  request.prompt.clear();
  const auto count = std::ssize(prompt);
  const int64_t context = state_->options.context;
  const int64_t limit =
      request.max_tokens < 0 ? context : std::min(context, count + request.max_tokens);

  auto sequence = std::make_unique<LiveSequence>(std::move(request));
  sequence->on_chunk = std::move(on_chunk);
  sequence->on_finish = std::move(on_finish);
  sequence->weights = std::move(weights);
  sequence->prompt_count = count;
  sequence->token_limit = limit;
  sequence->tokens = std::move(prompt);
  return state_->enqueue(std::move(sequence));
}

Status Engine::submit_embedding(std::string id, std::string model, std::vector<TokenId> ids,
                                OnEmbedding done) {
  GenerateRequest request;
  request.id = std::move(id);
  request.model = std::move(model);
  request.max_tokens = 0;
  DS_ASSIGN(auto weights, state_->versions.find(request.model));
  DS_TRY(state_->check(request, ids, *weights));

  auto sequence = std::make_unique<LiveSequence>(std::move(request));
  sequence->on_embedding = std::move(done);
  sequence->weights = std::move(weights);
  sequence->prompt_count = sequence->token_limit = std::ssize(ids);
  sequence->tokens = std::move(ids);
  sequence->hidden_sum.assign(static_cast<size_t>(state_->config.d_model), 0.0);
  return state_->enqueue(std::move(sequence));
}

bool Engine::cancel(const std::string& id) {
  {
    std::lock_guard lock(state_->mutex);
    const auto it = state_->live.find(id);
    if (it == state_->live.end()) return false;
    it->second->cancelled = true;
    state_->any_cancelled = true;
  }
  state_->wake.notify_one();
  return true;
}

void Engine::leave_device() {
  {
    std::lock_guard lock(state_->mutex);
    state_->leave_device = true;
  }
  state_->wake.notify_one();
}

void Engine::State::cancel_all() {
  for (const auto& [id, sequence] : live) sequence->cancelled = true;
  any_cancelled = true;
}

void Engine::drain(int64_t timeout_ms) {
  std::unique_lock lock(state_->mutex);
  state_->draining = true;
  const auto nothing_live = [this] { return state_->live.empty() && !state_->reporting; };
  if (state_->idle.wait_for(lock, std::chrono::milliseconds(timeout_ms), nothing_live)) return;
  state_->cancel_all();
  state_->wake.notify_one();
  state_->idle.wait(lock, nothing_live);
}

Json Engine::ps() const {
  const int64_t now = state_->clock.monotonic_ns();
  std::lock_guard lock(state_->mutex);
  Json items = Json::array();
  for (const auto& [id, s] : state_->live) {
    const int64_t first = s->first_token_ns;
    const int64_t generated = s->generated;
    items.push_back({{"id", id},
                     {"class", class_name(s->request.latency)},
                     {"state", !s->is_running   ? "waiting"
                               : generated == 0 ? "prefill"
                                                : "decode"},
                     {"version", s->weights->version},
                     {"prompt", s->prompt_count},
                     {"generated", generated},
                     {"ttft_s", first == 0 ? Json() : Json((first - s->submitted_ns) * 1e-9)},
                     {"age_s", (now - s->submitted_ns) * 1e-9}});
  }
  return items;
}

Json Engine::stats() const {
  const auto& m = state_->metrics;
  const double age_s = (state_->clock.monotonic_ns() - state_->rate_ns) * 1e-9;
  const Histogram& first = *m.per_class[static_cast<int>(LatencyClass::kInteractive)].first_token;
  const auto count = [](double gauge) { return static_cast<int64_t>(gauge); };
  return {{"running", count(m.running->value())},
          {"waiting", count(m.waiting->value())},
          {"kv_used", count(m.pages_held->value())},
          {"kv_cached", count(m.pages_cached->value())},
          {"kv_total", state_->kv_total.load()},
          {"prefix_hits", count(m.prefix_hits->value())},
          {"preemptions", count(m.preemptions->value())},
          {"prompt_tokens", count(m.prompt_tokens->value())},
          {"generated_tokens", count(m.generated_tokens->value())},
          {"tokens_per_s", state_->rate * std::exp(-std::max(age_s, 0.0) / kRateSeconds)},
          {"ttft_p50_s", first.quantile(0.5)},
          {"ttft_p99_s", first.quantile(0.99)}};
}

const EngineOptions& Engine::options() const { return state_->options; }

}  // namespace ds
