// SPDX-License-Identifier: Apache-2.0
// The engine thread between steps: cancellation, admission by class and KV pages, setting back,
// ending.
#include <algorithm>
#include <cmath>

#include "engine/engine_state.h"

namespace ds {
namespace {

/// New tokens that admission sets pages aside for. Longer answers take free pages as they grow and
/// may have to set back a younger sequence: rare, and invisible but for the time it costs.
constexpr int64_t kReservedNewTokens = 256;

double seconds(int64_t from_ns, int64_t to_ns) {
  return static_cast<double>(to_ns - from_ns) * 1e-9;
}

}  // namespace

void Engine::State::loop() {
  for (;;) {
    std::vector<LiveSequence*> cancelled;
    bool last_round = false, leave = false;
    {
      std::unique_lock lock(mutex);
      set_gauges();
      wake.wait(lock, [this] {
        return stopping || any_cancelled || (leave_device && !on_host) || !running.empty() ||
               waiting_count() > 0;
      });
      last_round = stopping;
      leave = leave_device && !on_host;
      cancelled = take_cancelled();
      admit();
      set_gauges();
    }
    for (LiveSequence* sequence : cancelled) {
      sequence->finish_reason = "cancelled";
      finish(*sequence);
    }
    if (last_round) return;  // stopping cancelled all that was live and nothing new comes in
    if (leave) move_to_host();
    if (!running.empty()) step();
  }
}

std::vector<LiveSequence*> Engine::State::take_cancelled() {
  std::vector<LiveSequence*> out;
  if (!any_cancelled) return out;
  any_cancelled = false;
  for (const auto& [id, sequence] : live) {
    if (!sequence->cancelled) continue;
    out.push_back(sequence.get());
    if (!sequence->is_running) std::erase(queue_of(*sequence), sequence.get());
  }
  return out;
}

/// Interactive before batch; within a class in order. The first that does not fit holds up the
/// rest, so that long prompts are not overtaken for ever.
void Engine::State::admit() {
  for (auto& queue : waiting) {
    while (!queue.empty()) {
      LiveSequence& next = *queue.front();
      const auto known = std::ssize(next.tokens);
      const int64_t growth = std::min(next.token_limit - known, kReservedNewTokens);
      const int64_t need = std::min(pages_for(known + growth), place->cache.total());
      if (!fits(need)) return;
      queue.pop_front();
      start(next, need);
    }
  }
}

bool Engine::State::fits(int64_t need) const {
  if (running.empty()) return true;  // every page can be had
  if (std::ssize(running) >= options.max_running) return false;
  int64_t spoken_for = need;
  for (const LiveSequence* s : running) {
    spoken_for += std::max(s->reserved_pages, std::ssize(s->pages));
  }
  return spoken_for <= place->cache.total();
}

void Engine::State::start(LiveSequence& s, int64_t need) {
  s.reserved_pages = need;
  if (s.request.prompt_logprobs && s.prompt_tokens.empty()) {
    TokenInfo first;  // nothing comes before it that could predict it
    first.id = s.tokens[0];
    first.bytes = tokenizer->bytes(first.id);
    s.prompt_tokens.push_back(std::move(first));
  }
  if (!s.needs_all_rows()) {
    // The last token is always computed: its logits are wanted.
    const auto reusable = std::span<const TokenId>(s.tokens).first(s.tokens.size() - 1);
    s.computed = place->cache.match(s.execution_id, reusable, s.pages);
    metrics.prefix_hits->add(static_cast<double>(s.pages.size()));
  }
  if (s.started_ns == 0) {
    s.started_ns = clock.monotonic_ns();
    s.cached_count = s.computed;
    metrics.per_class[s.cls()].queue->observe(seconds(s.submitted_ns, s.started_ns));
    metrics.prompt_tokens->add(static_cast<double>(s.prompt_count));
  }
  s.is_running = true;
  const auto older = [](const LiveSequence* a, const LiveSequence* b) {
    return a->arrival < b->arrival;
  };
  running.insert(std::upper_bound(running.begin(), running.end(), &s, older), &s);
}

/// Tokens already sent stay valid: the same tokens computed again have the same bits.
void Engine::State::preempt(LiveSequence& s) {
  give_back_pages(s);
  std::fill(s.hidden_sum.begin(), s.hidden_sum.end(), 0.0);
  std::erase(running, &s);
  s.is_running = false;
  metrics.preemptions->add();
  std::lock_guard lock(mutex);
  queue_of(s).push_front(&s);
}

void Engine::State::publish_pages(LiveSequence& s) {
  const auto computed = std::span<const TokenId>(s.tokens).first(static_cast<size_t>(s.computed));
  place->cache.publish(s.execution_id, computed, s.pages);
}

void Engine::State::give_back_pages(LiveSequence& s) {
  if (s.failure.ok()) publish_pages(s);  // what gave NaN is never used again
  place->cache.release(s.pages);
  s.computed = 0;
}

void Engine::State::finish(LiveSequence& s) {
  if (s.is_running) std::erase(running, &s);
  give_back_pages(s);
  std::unique_ptr<LiveSequence> ended;
  {
    std::lock_guard lock(mutex);
    const auto it = live.find(s.request.id);
    ended = std::move(it->second);
    live.erase(it);  // before the callback: whoever has the answer may use the id again
    reporting = true;
  }
  report(s);
  ended.reset();  // callbacks own things too: gone before drain() returns
  std::lock_guard lock(mutex);
  reporting = false;
  if (live.empty()) idle.notify_all();
}

void Engine::State::report(LiveSequence& s) {
  const int64_t now = clock.monotonic_ns();
  metrics.per_class[s.cls()].request->observe(seconds(s.submitted_ns, now));
  if (s.on_embedding) return report_embedding(s);
  s.answer.end();
  const Chunk chunk = s.answer.take();
  if (s.on_chunk && !(chunk.text.empty() && chunk.tokens.empty())) s.on_chunk(chunk);
  if (!s.on_finish) return;
  Finish f;
  f.status = s.failure;
  if (s.failure.ok()) f.finish_reason = s.finish_reason;
  f.text = s.answer.text();
  f.prompt_tokens = std::move(s.prompt_tokens);
  f.tokens = s.answer.tokens();
  f.prompt_count = s.prompt_count;
  f.completion_count = s.generated;
  f.cached_count = s.cached_count;
  f.version = s.weights->version;
  f.fingerprint = s.weights->fingerprint;
  const auto since_submission_us = [&](int64_t ns) {
    return ns == 0 ? 0 : (ns - s.submitted_ns) / 1000;
  };
  f.queue_us = since_submission_us(s.started_ns);
  f.first_token_us = since_submission_us(s.first_token_ns);
  f.total_us = since_submission_us(now);
  s.on_finish(f);
}

void Engine::State::report_embedding(const LiveSequence& s) {
  Status status = s.failure;
  if (s.finish_reason == "cancelled") status = {Code::kCancelled, "embedding: cancelled"};
  std::vector<float> mean;
  for (const double sum : s.hidden_sum) {
    mean.push_back(static_cast<float>(sum / static_cast<double>(s.prompt_count)));
  }
  const auto finite = [](float x) { return std::isfinite(x); };
  if (status.ok() && !std::ranges::all_of(mean, finite)) {
    status = corrupt("version " + s.weights->version + ": the hidden states are not finite");
  }
  if (!status.ok()) mean.clear();
  s.on_embedding(status, std::move(mean), s.weights->version);
}

void Engine::State::set_gauges() {
  metrics.running->set(static_cast<double>(running.size()));
  metrics.waiting->set(static_cast<double>(waiting_count()));
  metrics.pages_held->set(static_cast<double>(place->cache.held()));
  metrics.pages_cached->set(static_cast<double>(place->cache.cached()));
  metrics.pages_free->set(static_cast<double>(place->cache.free()));
}

}  // namespace ds
