// SPDX-License-Identifier: Apache-2.0
// Training passes of the decoder over Ops: forward that keeps what backward needs, and backward for
// the low-rank factors (`Adapters`) or for every parameter (`FullGradients`). Hand-written, no
// tape.
//
// A batch is several sequences packed by rows. A sequence may stand behind a frozen prefix (the
// chat template's system turn): its K/V are read, never recomputed and get no gradient.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/parameters.h"
#include "engine/step_recordings.h"

namespace ds {

/// FP32 masters and gradients of the low-rank factors of chosen targets, in one vector of the
/// backend. Per layer and target: A [rank, k], then B^T [rank, n].
class Adapters {
 public:
  /// `targets` bit t set = Target t is adapted in every layer. 1 <= rank <= kLoraRank. Zero.
  static Result<std::unique_ptr<Adapters>> make(const Compute& compute, const ModelConfig& config,
                                                int64_t rank, float scale, uint32_t targets);

  /// A uniform in +-1/sqrt(k) (as PEFT), B zero: the start changes nothing.
  void initialise(uint64_t seed);

  /// The same parameters, neither packed nor with a gradient.
  Result<std::unique_ptr<Adapters>> copy() const;

  int64_t rank() const { return rank_; }
  float scale() const { return scale_; }
  uint32_t targets() const { return targets_; }
  bool adapts(Target t) const { return (targets_ >> t & 1u) != 0; }
  size_t size() const { return parameters_.size(); }
  BackendVector& parameters() { return parameters_; }
  BackendVector& gradient() { return gradient_; }  ///< empty until zero_gradient() has made it
  const BackendVector& gradient() const { return gradient_; }
  Status zero_gradient();

  float* a_gradient(int64_t layer, Target t) { return gradient().data() + offset(layer, t); }
  float* bt_gradient(int64_t layer, Target t) {
    return a_gradient(layer, t) + rank_ * target_shape(config_, t).second;
  }

  /// Factors in HF layout, for LoraDelta::pack and files.
  Result<std::vector<LoraDelta::LayerFactors>> factors() const;
  Status set_factors(const std::vector<LoraDelta::LayerFactors>& factors);

  /// Refreshes the packed forms used by the passes; call after each change of parameters.
  Status pack(const OperandFormats& formats);
  const void* packs() const { return packs_.data(); }
  LoraPair forward_pair(int64_t layer, Target t) const;   ///< A, B; once packed
  LoraPair backward_pair(int64_t layer, Target t) const;  ///< B^T, A^T

 private:
  Adapters(const Compute& compute, const ModelConfig& config, int64_t rank, float scale,
           uint32_t targets);
  struct Packed {
    WeightView a, b, at, bt;
  };
  int64_t offset(int64_t layer, Target t) const {
    return offsets_[static_cast<size_t>(layer * kTargets + t)];
  }
  /// visit(layer, target) of each adapted weight.
  template <class Visit>
  void each_adapted(const Visit& visit) const;
  Status lay_out_packs(const OperandFormats& formats);

  Compute compute_;
  ModelConfig config_;
  int64_t rank_;
  float scale_;
  uint32_t targets_;
  std::vector<int64_t> offsets_;
  BackendVector parameters_, gradient_;
  std::vector<Packed> packed_;  ///< [layers * kTargets], of `formats_`
  OperandFormats formats_{WeightFormat::kBF16, 0};
  Buffer packs_, pack_list_;  ///< all of them, and what pack_factors() is told
};

/// K (rotated) and V of a prefix at every layer, FP32 [tokens, n_kv_heads * head_dim], in the
/// memory of the backend.
struct PrefixKv {
  int64_t tokens = 0;
  std::vector<Buffer> k, v;
};

struct TrainBatch {
  struct Sequence {
    int64_t row0 = 0, n_rows = 0;
    const PrefixKv* prefix = nullptr;  ///< null: positions start at 0
  };
  std::vector<TokenId> ids;         ///< [rows]
  std::vector<Sequence> sequences;  ///< in row order, covering all rows
  std::vector<int32_t> loss_rows;   ///< rows whose logits are wanted, ascending

  /// Appends one sequence; the rows predicting ids[first_target..] become loss rows. Returns row0.
  int64_t add(std::span<const TokenId> sequence, int64_t first_target, const PrefixKv* prefix);
};

class TrainGraph {
 public:
  TrainGraph(const ModelConfig& config, const Compute& compute);

  /// What the products over such a base multiply; adapters are packed so.
  const OperandFormats& formats(const BaseWeights& base);
  /// All in the format of the base again: what a round computes depends on no round before it.
  void forget_fallen();
  /// How many values in inputs of linear layers have saturated in FP16 since the last call, as of
  /// the last fetch_saturation(), which finish() has completed. What read them falls back.
  int64_t settle_saturation();
  void fetch_saturation();

  /// The first failure of a plugin or the device, or the first want of memory, in the passes since
  /// the last call of this; their results are undefined.
  Status take_status() { return std::exchange(status_, Status()); }

  /// Logits of the loss rows, FP32 [loss_rows, vocab], in the memory of the backend; valid until
  /// the next call. `adapters` may be null (base alone) and must be packed. Grows its workspace
  /// when a batch is larger than any before; null when there is no memory for that.
  float* forward(const BaseWeights& base, const Adapters* adapters, const TrainBatch& batch);

  /// Where the losses put d loss / d logits, in the order of the loss rows, as Ops::prepare() gives
  /// rows; null: over the logits. Valid after forward() until backward().
  void* prepared_gradient() { return dlogits_prepared_; }
  /// After forward() of the same batch: gradients from d loss / d logits. Adds to `adapters` and
  /// `full`, each may be null.
  void backward(const BaseWeights& base, Adapters* adapters, FullGradients* full,
                const TrainBatch& batch);

  /// Runs the base over `ids` and keeps the K/V of all its rows.
  Result<PrefixKv> prefix(const BaseWeights& base, std::span<const TokenId> ids);
  /// For what the losses look up and give between forward() and backward().
  CallTables& loss_tables() { return loss_tables_; }
  /// The first `rows` of what forward() returned, where the host can read them.
  const float* host_logits(int64_t rows);
  /// Gives back all that grows with a batch, so that a smaller one, or something else, finds room.
  void release();

 private:
  struct LayerState {
    Buffer x, q, k, v, attended, saved, mid, gate, up, t;
  };
  struct Call {  ///< what one pass needs at hand
    const BaseWeights& base;
    const TrainBatch& batch;
    const Adapters* adapters;
    Adapters* gradients;
    FullGradients* full;
    int64_t rows;
  };
  /// What is enqueued between the calls of plugins and of the losses: recorded where the device
  /// does that, so that a step of few rows does not wait for its some thousand launches. Small, as
  /// training gives way to serving between pieces.
  enum class Piece : uint64_t {
    kQkv,
    kOutputGateUp,
    kDown,
    kBackDown,
    kBackGateUp,
    kBackOutput,
    kBackQkv
  };
  /// Rows that linear layers read: FP32, or as Ops::prepare() gives them; one of the two may be
  /// null.
  struct Input {
    float* x = nullptr;
    void* prepared = nullptr;
    int64_t stride = 0;  ///< PreparedRows::stride of the latter
    PreparedRows rows() const { return {.data = prepared, .stride = stride}; }  ///< in BF16
  };
  /// Gradients of what several targets make of one input.
  struct Gradients {
    Input of[kMaxFusedWeights];
    int count = 0;
    /// W^T of all of them, where the gradients lie side by side; else without data.
    WeightView together;
  };
  /// Which rows are prepared: as the operands of what, and where saturation is counted.
  struct Operand {
    WeightFormat format;
    int32_t* saturated = nullptr;
  };
  Operand forward_operand(int64_t layer, Target reader);
  Operand backward_operand() const { return {formats_.backward()}; }
  Status reserve(int64_t rows, int64_t loss_rows);
  Status reserve_rows(int64_t rows);
  Status reserve_loss_rows(int64_t rows);
  Status reserve_saturation();
  void linear(const Call& call, int64_t layer, Target first, Input input,
              std::initializer_list<float*> y, const float* residual, void* y_16 = nullptr);
  Status linear_in_format(const Call& call, std::span<const Linear* const> weights, int64_t layer,
                          Target first, LinearArgs& args);
  void linear_backward(const Call& call, int64_t layer, Target first, Gradients& dy, Input x,
                       float* dx);
  void input_gradient(const Call& call, int64_t layer, Target first, Gradients& dy, float* dx,
                      void* dx_16 = nullptr);
  void weight_gradients(const Call& call, int64_t layer, Target first, const Gradients& dy,
                        Input x);
  void add_input_gradient(const Call& call, int64_t layer, Target target, const WeightView& turned,
                          Input dy, float* dx, void* dx_16, bool accumulate);
  void add_outers(const Call& call, int64_t layer, Target target, Input dy, Input x,
                  std::vector<OuterArgs>& to);
  OuterArgs outer(const Call& call, Input dy, int64_t n, int64_t dy_stride, Input x, int64_t k,
                  float scale, float* out) const;
  RopeArgs rotation(const Call& call, float* q, float* k) const;
  bool keeps_halves(const Call& call, int64_t layer) const;
  bool gives_bf16(const Call& call, int64_t columns) const;
  SwigluArgs gate_and_up(const Call& call, int64_t layer) const;
  WeightView turned_together(const Call& call, int64_t layer, Target first, int count);
  Gradients room_for_gradients(const Call& call, int64_t layer, Target first,
                               std::initializer_list<Buffer*> fp32);
  Gradients gate_up_gradients(const Call& call, int64_t layer) {
    return room_for_gradients(call, layer, kGate, {&dwide_, &dwide2_});
  }
  void* prepared_dx(const Call& call);
  void run_piece(Piece piece, int64_t layer, const std::function<void()>& enqueue);
  bool is_recorded(int64_t rows) const;  ///< passes of so many, padding or not
  int64_t padding_of(int64_t rows) const;
  void set_key(const BaseWeights& base, const Adapters* adapters, const FullGradients* full);
  void query_key_value(const Call& call, int64_t layer);
  void output_gate_up(const Call& call, int64_t layer);
  void down(const Call& call, int64_t layer);
  void forward_layer(const Call& call, int64_t layer);
  void backward_down(const Call& call, int64_t layer);
  void backward_gate_up(const Call& call, int64_t layer);
  void backward_output(const Call& call, int64_t layer);
  void backward_attention(const Call& call, int64_t layer);
  void backward_query_key_value(const Call& call, int64_t layer);
  void head_forward(const Call& call);
  void head_backward(const Call& call);
  void note(const Status& status) {
    if (status_.ok()) status_ = status;
  }
  Status set_tables(const TrainBatch& batch);
  /// On a GPU products round where those of the base's weights do; a CPU computes in FP32.
  Status begin_attention(const TrainBatch& batch);
  /// K/V of each sequence's prefix at a layer go to prefix_k_ and prefix_v_.
  TrainingAttention::Pointers attention_pointers(const TrainBatch& batch, int64_t layer);
  float* t_of(int64_t layer, Target target);
  float* dt_of(Target target) { return dt_.as<float>() + target * rows_ * kLoraRank; }
  WeightView transposed(const Call& call, int64_t layer, Target target);
  float* norm_gradient(const Call& call, const std::string& name);
  void* prepare(const Operand& as, int64_t rows, int64_t k, const float* x, Buffer& to);
  PreparedRows room_for_prepared(const Operand& as, int64_t rows, int64_t k, Buffer& to);
  PreparedRows room_for_input(const Call& call, const Operand& as, int64_t k);
  Input norm(const Call& call, const Operand& as, const float* x, const BackendFloats& weight,
             float* rstd);
  Input activate(const Call& call, int64_t layer);

  ModelConfig config_;
  Compute compute_;
  Status status_;
  OperandFormats formats_{WeightFormat::kBF16, 0};
  Buffer saturated_;                        ///< int32 [inputs], summed up since formats_ was made
  std::vector<int32_t> counted_, settled_;  ///< of those: as fetched, as settled
  std::shared_ptr<const Components> components_;  ///< of the last forward()
  TextEncoding encoding_;
  TrainingAttention attention_;
  StepRecordings recordings_;
  StepRecordings::Key key_;  ///< of this pass, but for the piece; empty: it is not recorded
  int64_t rows_ = 0,
          padding_ = 0;  ///< of the batch: all rows, and those at the end that are padding
  LinearScratch scratch_;
  std::vector<const float*> prefix_k_, prefix_v_;  ///< of each sequence, null where it has none
  int64_t max_rows_ = 0, max_loss_rows_ = 0;
  std::vector<LayerState> layers_;
  /// Of the batch: ids, positions in their sequences, and slot 0 for each row; its loss rows.
  CallTables tables_, loss_tables_;
  const int32_t *ids_ = nullptr, *positions_ = nullptr, *slot_0_ = nullptr, *loss_rows_ = nullptr;
  Buffer x_, normed_, activated_, rstd_, dx_, dnormed_, dwide_, dwide2_, dq_, dk_, dv_, dattended_,
      dt_;
  std::vector<float> fetched_;
  Buffer picked_, head_in_, head_rstd_, logits_, ones_;
  Buffer prepared_, prepared_dy_, prepared_dup_, prepared_dv_, prepared_dx_, prepared_head_,
      prepared_dlogits_;  ///< what linear() reads
  void* dlogits_prepared_ = nullptr;
};

}  // namespace ds
