// SPDX-License-Identifier: Apache-2.0
// Learners for the tests of the host: one that uses all that the kind offers, one that breaks the
// contract as its config says.
#include <cmath>

#include "ds/plugin.hpp"

namespace {

namespace sdk = ds::sdk;

ds_draw draw(std::uint64_t key, std::uint32_t term) {
  ds_draw d{};
  d.key = key;
  d.term = term;
  d.weight = 1;
  return d;
}

/// A-GEM (Chaudhry et al. 2019, eq. 11): the gradient of fresh lessons without what speaks against
/// that of earlier ones. Also counts its rounds and sums the weights after each step.
struct remembering {
  static constexpr std::string_view name = "remembering";
  static constexpr std::string_view config_schema = R"({"type": "object"})";
  static constexpr std::uint64_t caps = DS_CAP_CPU | DS_CAP_DETERMINISTIC | DS_CAP_STATEFUL;

  explicit remembering(sdk::context) {}
  std::string save() const { return std::to_string(rounds_); }
  void restore(std::string state, std::string_view) { rounds_ = std::stoi(state); }

  void round_begin(const ds_round&) { ++rounds_; }

  template <class Emit>
  void draws(const ds_call& call, std::span<const ds_sample> samples, Emit&& emit) const {
    if (call.step == 4) return;
    for (const ds_sample& s : samples) {
      if (s.pool == DS_POOL_FRESH) {
        emit(draw(s.key, DS_TERM_CE));
        emit(draw(s.key, DS_TERM_KL_PARENT));
        emit(draw(s.key, DS_TERM_SEQUENCE));
      } else if (s.pool == DS_POOL_REPLAY) {
        ds_draw earlier = draw(s.key, DS_TERM_CE);
        earlier.slot = 1;
        emit(earlier);
      }
    }
  }
  void coefficients(const ds_call& call, std::span<const ds_sequence_stat> stats,
                    std::span<double> out) const {
    for (std::size_t i = 0; i < stats.size(); ++i) {
      if (call.step == 0 && std::abs(stats[i].logprob - stats[i].logprob_parent) > 1e-4)
        throw sdk::error(DS_E_INTERNAL, "the first step's weights are not the parent's");
      out[i] = -0.01;
    }
  }
  void combine(const ds_call&, const ds_vectors& host) const {
    const sdk::vectors v(host);
    const double against = v.dot(0, 1), earlier = v.dot(1, 1);
    if (against < 0) v.axpy(static_cast<float>(-against / earlier), 1, 0);
    if (earlier > 0 && v.dot(0, 1) < -1e-3 * earlier)
      throw sdk::error(DS_E_INTERNAL, "the projection did not work");
  }
  void stepped(const ds_call&, const ds_vectors& host, const ds_step_report&) const {
    const sdk::vectors v(host);
    v.axpy(1.0f, DS_VEC_WEIGHTS, v.make("sum"));
  }

 private:
  int rounds_ = 0;
};

struct faulty {
  static constexpr std::string_view name = "faulty";
  static constexpr std::string_view config_schema =
      R"({"type": "object", "properties": {"fault": {"type": "string", "default": "error"}}})";
  static constexpr std::uint64_t caps = DS_CAP_CPU;

  explicit faulty(sdk::context c) : fault_(c.get("fault", "error")) {}

  template <class Emit>
  void draws(const ds_call&, std::span<const ds_sample> samples, Emit&& emit) const {
    ds_draw d = draw(samples[0].key, DS_TERM_CE);
    if (fault_ == "error") throw sdk::error(DS_E_DATA, "I will not");
    if (fault_ == "key") d.key = 7;
    if (fault_ == "term") d.term = 9;
    if (fault_ == "logits") d.term = DS_TERM_LOGIT_MSE;
    if (fault_ == "weight") d.weight = NAN;
    if (fault_ == "slot") d.slot = 4;
    if (fault_ == "no combine") d.slot = 1;
    if (fault_ == "rejected") d.rejected = 1;
    if (fault_ == "sequence") d.term = DS_TERM_SEQUENCE;
    for (int i = 0; fault_ == "many" && i < 5000; ++i) emit(d);
    emit(d);
  }

 private:
  std::string fault_;
};

}  // namespace

DS_PLUGIN("org.driftstone.learner-probe", "1.2.0", "Apache-2.0", remembering, faulty)
