// SPDX-License-Identifier: Apache-2.0
// Fine-tuning and nothing else: cross-entropy of the fresh lessons. What other learners are
// measured against.
#include "modules/learners/choose.h"

namespace ds::modules {
namespace {

struct naive {
  static constexpr std::string_view name = "naive";
  static constexpr std::string_view config_schema = R"({"type": "object", "properties": {
    "lessons": {"type": "integer", "minimum": 1, "maximum": 1024, "default": 6,
      "description": "fresh lessons in a step, those furthest from learned"}}})";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_CUDA | DS_CAP_DETERMINISTIC;

  explicit naive(sdk::context c) : lessons_(c.get("lessons", 6)) {}

  void round_begin(const ds_round& round) { per_step_ = lessons_per_step(lessons_, round); }

  template <class Emit>
  void draws(const ds_call&, std::span<const ds_sample> samples, Emit&& emit) const {
    const Samples fresh = furthest(of_pool(samples, DS_POOL_FRESH), per_step_);
    for (const ds_sample* s : fresh) emit(draw(*s, DS_TERM_CE, 1.0 / double(fresh.size())));
  }

 private:
  std::int64_t lessons_;
  std::size_t per_step_ = 1;
};

}  // namespace
}  // namespace ds::modules

DS_PLUGIN("org.driftstone.learner.naive", "1.0.0", "Apache-2.0", ds::modules::naive)
