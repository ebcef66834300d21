// SPDX-License-Identifier: Apache-2.0
// One step: every decoding sequence gets one row, waiting prompts share the rest of the rows; rows
// on one base go through the model together, whatever versions they are; then each logits row
// becomes a token.
#include <algorithm>
#include <cmath>

#include "engine/engine_state.h"

namespace ds {

void Engine::State::step() {
  plan();
  plan_pages();
  if (planned.empty()) return;
  const double before = metrics.generated_tokens->value();
  pool.begin_engine_step(static_cast<int64_t>(metrics.waiting->value()));
  group_runs();
  Status ran;
  size_t done = 0;
  while (done < n_runs && (ran = run(runs[done])).ok()) ++done;
  pool.end_engine_step();

  const int64_t now = clock.monotonic_ns();
  const double made = metrics.generated_tokens->value() - before;
  const double age_s = static_cast<double>(now - rate_ns) * 1e-9;
  rate = rate * std::exp(-age_s / kRateSeconds) + made / kRateSeconds;
  rate_ns = now;
  const bool leave = !ran.ok() && !go_on_after(ran, runs[done]);
  if (ran.ok()) row_limit = std::min(row_limit + 1, place->forward.max_rows());
  deliver();
  if (leave) move_to_host();
}

/// After `run` ended with `failure`. What a plugin or the version itself made fail ends. What only
/// found no memory, or a device that is gone, is computed again: fewer rows at a time, or elsewhere
/// (false). Runs after it have not begun; the next step has them.
bool Engine::State::go_on_after(const Status& failure, const Run& run) {
  // Once the device has failed nothing has memory, and plugins fail too.
  if (!ds::finish(place->compute).ok()) return false;
  if (failure.code() != Code::kResource) {
    for (const PlannedRows& item : run.items) item.sequence->failure = failure;
    return true;
  }
  int64_t rows = 0;
  for (const PlannedRows& item : planned) rows += item.rows;
  place->forward.forget_recordings();
  row_limit = std::max<int64_t>(rows / 2, 1);
  if (rows > 1) return true;
  DS_CHECK(!place->compute.ops->host_memory);  // host out of memory: die
  if (host.device != nullptr) host.device->lose(failure.message());
  return false;
}

void Engine::State::plan() {
  planned.clear();
  for (LiveSequence* s : running) {
    if (s->remaining() == 1 && std::ssize(planned) < row_limit) planned.push_back({s, 1});
  }
  int64_t budget = std::min(options.prefill_chunk, row_limit - std::ssize(planned));
  for (const auto latency : {LatencyClass::kInteractive, LatencyClass::kBatch}) {
    for (LiveSequence* s : running) {
      if (s->remaining() == 1 || s->request.latency != latency || budget == 0) continue;
      const int64_t rows = std::min(budget, s->remaining());
      planned.push_back({s, rows});
      budget -= rows;
    }
  }
}

/// Gives every planned row a place for its K/V. When pages run out, the youngest sequence waits:
/// the oldest always goes on, so the engine as a whole does.
void Engine::State::plan_pages() {
  for (const PlannedRows& item : planned) {
    LiveSequence& s = *item.sequence;
    while (s.is_running) {
      const int64_t missing = pages_for(s.computed + item.rows) - std::ssize(s.pages);
      const size_t had = s.pages.size();
      if (missing <= 0) break;
      if (place->cache.allocate(missing, s.pages)) {
        place->pages.clear_extra(std::span<const int32_t>(s.pages).subspan(had));
        break;
      }
      preempt(*victim());
    }
  }
  std::erase_if(planned, [](const PlannedRows& item) { return !item.sequence->is_running; });
}

LiveSequence* Engine::State::victim() const {
  return *std::ranges::max_element(
      running, {}, [](const LiveSequence* s) { return std::pair(s->cls(), s->arrival); });
}

void Engine::State::group_runs() {
  n_runs = 0;
  for (const PlannedRows& item : planned) {
    const BaseWeights* base = item.sequence->weights->base.get();
    const Components* components = item.sequence->components.get();
    const LoraDelta* delta = item.sequence->weights->delta.get();
    const auto takes = [&](const Run& r) {
      const bool has_delta =
          delta == nullptr || std::ranges::find(r.deltas, delta) != r.deltas.end();
      return r.base == base && r.components == components &&
             (has_delta || std::ssize(r.deltas) < kMaxLoraSlots);
    };
    const auto end = runs.begin() + static_cast<ptrdiff_t>(n_runs);
    auto at = std::find_if(runs.begin(), end, takes);
    if (at == end) {
      if (++n_runs > runs.size()) runs.emplace_back();
      at = runs.begin() + static_cast<ptrdiff_t>(n_runs) - 1;
      at->base = base;
      at->components = components;
      at->deltas.clear();
      at->items.clear();
    }
    if (delta != nullptr && std::ranges::find(at->deltas, delta) == at->deltas.end()) {
      at->deltas.push_back(delta);
    }
    at->items.push_back(item);
  }
}

Status Engine::State::run(const Run& run) {
  ids.clear();
  spans.clear();
  slots.clear();
  uses.clear();
  bool wants_hidden = false;
  for (const PlannedRows& item : run.items) {
    const LiveSequence& s = *item.sequence;
    const int64_t row0 = std::ssize(ids);
    const auto first = s.tokens.begin() + s.computed;
    ids.insert(ids.end(), first, first + item.rows);
    spans.push_back({row0, item.rows, s.computed, s.pages.data()});
    const auto slot = std::ranges::find(run.deltas, s.weights->delta.get()) - run.deltas.begin();
    slots.insert(slots.end(), static_cast<size_t>(item.rows),
                 s.weights->delta == nullptr ? -1 : static_cast<int32_t>(slot));
    list_logits(item, row0);
    wants_hidden |= s.on_embedding != nullptr;
  }
  if (wants_hidden && hidden.empty()) {
    hidden.resize(static_cast<size_t>(place->forward.max_rows() * config.d_model));
  }
  order_uses();
  const StepBatch batch{ids, spans, slots, run.deltas, logit_rows, draws, run.components};
  DS_TRY(place->forward.run(*run.base, batch, place->pages, place->logits.as<float>(),
                            wants_hidden ? hidden.data() : nullptr, place->tokens.as<TokenId>()));
  judge_logits();

  int64_t row0 = 0;
  for (const PlannedRows& item : run.items) {
    if (item.sequence->on_embedding) add_hidden(item, row0);
    row0 += item.rows;
    item.sequence->computed += item.rows;
  }
  const int64_t now = clock.monotonic_ns();
  for (LogitUse& use : uses) apply(use, now);
  for (const PlannedRows& item : run.items) settle(item);
  return {};
}

void Engine::State::list_logits(const PlannedRows& item, int64_t row0) {
  LiveSequence& s = *item.sequence;
  const auto want = [&](int64_t position, bool samples) {
    LogitUse& use = uses.emplace_back();
    use.sequence = &s;
    use.position = position;
    use.samples = samples;
    use.row = static_cast<int32_t>(row0 + position - s.computed);
    if (samples) use.draw = drawn_there(s, position);
  };
  const int64_t end = s.computed + item.rows;
  if (s.scores_prompt()) {
    const int64_t next_entry = std::ssize(s.prompt_tokens);
    for (int64_t p = std::max(s.computed, next_entry - 1); p < std::min(end, s.prompt_count - 1);
         ++p) {
      want(p, false);
    }
  }
  const auto known = std::ssize(s.tokens);
  if (end == known && known < s.token_limit) want(end - 1, true);
}

/// A GPU takes the token where that needs no more than the logits, which then need not come here.
std::optional<Draw> Engine::State::drawn_there(const LiveSequence& s, int64_t position) const {
  if (place->compute.ops->host_memory || s.request.logprobs >= 0) return std::nullopt;
  return plain_draw(s.request.sampling, s.counts, static_cast<uint64_t>(position + 1));
}

void Engine::State::order_uses() {
  std::ranges::stable_partition(uses, [](const LogitUse& use) { return !use.draw.has_value(); });
  logit_rows.clear();
  draws.clear();
  for (const LogitUse& use : uses) {
    logit_rows.push_back(use.row);
    if (use.draw.has_value()) draws.push_back(*use.draw);
  }
}

void Engine::State::judge_logits() {
  const int64_t whole = std::ssize(uses) - std::ssize(draws);
  for (int64_t i = whole; i < std::ssize(uses); ++i) {
    LogitUse& use = uses[static_cast<size_t>(i)];
    use.token = place->tokens.as<TokenId>()[i - whole];
    if (use.token < 0) use.status = corrupt("a logit is not finite");
  }
  if (whole == 0) return;
  struct Job {
    State* state;
    int64_t tasks, uses;
  } job{this, std::min(std::ssize(scratch), whole), whole};
  const ds_task_fn judge_some = [](void* user, int64_t task) {
    const Job& job = *static_cast<Job*>(user);
    State& state = *job.state;
    const int64_t vocab = state.config.vocab;
    for (int64_t i = task; i < job.uses; i += job.tasks) {
      const std::span row(state.place->logits.as<float>() + i * vocab, static_cast<size_t>(vocab));
      state.judge(state.uses[static_cast<size_t>(i)], row,
                  state.scratch[static_cast<size_t>(task)]);
    }
  };
  if (job.tasks == 1) {
    judge_some(&job, 0);
  } else {
    const ds_parallel* parallel = host.context.parallel;
    parallel->run(parallel->ctx, job.tasks, judge_some, &job);
  }
}

void Engine::State::judge(LogitUse& use, std::span<const float> row,
                          SampleScratch& workspace) const {
  const LiveSequence& s = *use.sequence;
  const GenerateRequest& r = s.request;
  use.token = use.samples ? 0 : s.tokens[static_cast<size_t>(use.position + 1)];
  if (use.samples) {
    const auto token =
        sample_token(row, r.sampling, s.counts, static_cast<uint64_t>(use.position + 1), workspace);
    if (token.ok()) use.token = *token;
    use.status = token.status();
    if (r.logprobs < 0 || !token.ok()) return;
  }
  auto scores = score_token(row, use.token, std::max(r.logprobs, 0), workspace);
  use.status = scores.status();
  if (scores.ok()) use.scores = std::move(*scores);
}

void Engine::State::apply(LogitUse& use, int64_t now_ns) {
  LiveSequence& s = *use.sequence;
  if (!s.failure.ok()) return;
  if (!use.status.ok()) {
    s.failure = use.status.in("version " + s.weights->version + ", position " +
                              std::to_string(use.position + 1));
  } else if (use.samples) {
    accept_token(s, use, now_ns);
  } else {
    s.prompt_tokens.push_back({use.token, std::string(tokenizer->bytes(use.token)), true,
                               use.scores.logprob, std::move(use.scores.top)});
  }
}

void Engine::State::accept_token(LiveSequence& s, LogitUse& use, int64_t now_ns) {
  s.tokens.push_back(use.token);
  ++s.generated;
  if (s.penalised()) ++s.counts[use.token];
  metrics.generated_tokens->add();
  const auto& timing = metrics.per_class[s.cls()];
  if (s.first_token_ns == 0) {
    s.first_token_ns = now_ns;
    timing.first_token->observe(static_cast<double>(now_ns - s.submitted_ns) * 1e-9);
  } else {
    timing.inter_token->observe(static_cast<double>(now_ns - s.last_token_ns) * 1e-9);
  }
  s.last_token_ns = now_ns;

  if (std::ranges::find(s.request.stop_ids, use.token) != s.request.stop_ids.end()) {
    s.finish_reason = "stop";
    return;
  }
  const std::string_view bytes = tokenizer->bytes(use.token);
  std::optional<TokenInfo> info;
  if (s.request.logprobs >= 0) {
    info = TokenInfo{use.token, std::string(bytes), true, use.scores.logprob,
                     std::move(use.scores.top)};
  }
  s.answer.add(tokenizer->is_special(use.token) ? std::string_view() : bytes, std::move(info));
  if (s.answer.stopped()) {
    s.finish_reason = "stop";
  } else if (std::ssize(s.tokens) >= s.token_limit) {
    s.finish_reason = "length";
  }
}

/// In double and row by row, so that the mean does not depend on how the tokens were cut into
/// steps.
void Engine::State::add_hidden(const PlannedRows& item, int64_t row0) {
  std::vector<double>& sum = item.sequence->hidden_sum;
  const size_t d = sum.size();
  for (int64_t r = row0; r < row0 + item.rows; ++r) {
    const float* row = hidden.data() + static_cast<size_t>(r) * d;
    for (size_t i = 0; i < d; ++i) sum[i] += row[i];
  }
}

void Engine::State::settle(const PlannedRows& item) {
  LiveSequence& s = *item.sequence;
  if (s.over() || s.computed < s.prompt_count) return;
  if (item.rows > 1) {  // a prompt is complete: others that begin alike need not wait for the end
    publish_pages(s);
  }
  if (s.remaining() == 0) s.finish_reason = "length";  // nothing was to be sampled
}

void Engine::State::deliver() {
  for (const PlannedRows& item : planned) {
    LiveSequence& s = *item.sequence;
    if (s.over()) {
      finish(s);
      continue;
    }
    const Chunk chunk = s.answer.take();
    if (s.on_chunk && !(chunk.text.empty() && chunk.tokens.empty())) s.on_chunk(chunk);
  }
}

}  // namespace ds
