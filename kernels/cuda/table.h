// SPDX-License-Identifier: Apache-2.0
// The entries of the table, declared: what ops.h says of each holds here.
#pragma once

#include "kernels/ops.h"

namespace ds::cuda {

// linear.cu, pack.cu
int64_t packed_bytes(WeightFormat, int64_t n, int64_t k);
void pack(const OpContext&, WeightFormat, int64_t n, int64_t k, const float* source,
          bool transposed, void* packed);
void unpack(const OpContext&, const WeightView&, float* out);
int64_t prepared_bytes(WeightFormat, int64_t rows, int64_t k);
void prepare(const OpContext&, int64_t rows, int64_t k, const float* x, int64_t x_stride,
             const PreparedRows& to);
void linear(const OpContext&, const LinearArgs&);
void pack_all(const OpContext&, int64_t count, const PackItem* items);
void pack_factors(const OpContext&, int64_t rank, int64_t count, const FactorPack* factors);
void outer_accumulate(const OpContext&, int64_t count, const OuterArgs*);

// rows.cu
void rmsnorm(const OpContext&, int64_t rows, int64_t d, const float* x, const float* w, float eps,
             float* y, float* rstd, const PreparedRows& prepared);
void rmsnorm_backward(const OpContext&, int64_t rows, int64_t d, const float* dy, const float* x,
                      const float* w, const float* rstd, float* dx, void* dx_prepared, float* dw);
void rope_append(const OpContext&, const RopeAppendArgs&);
void rope(const OpContext&, const RopeArgs&);
void swiglu(const OpContext&, const SwigluArgs&);
void swiglu_backward(const OpContext&, const SwigluArgs&);
void relu(const OpContext&, int64_t n, float* x);
void relu_backward(const OpContext&, int64_t n, const float* y, float* dy);

// embed.cu
void embed(const OpContext&, const WeightView& table, int64_t rows, const int32_t* ids, float* out);
void gather_rows(const OpContext&, int64_t rows, int64_t d, const int32_t* index, const float* x,
                 float* out);
void scatter_rows(const OpContext&, int64_t rows, int64_t d, const int32_t* index, const float* x,
                  float* out);
void embed_backward(const OpContext&, int64_t rows, int64_t d, const int32_t* ids, const float* dy,
                    float* out);

// attention.cu, attention_train.cu, choose_keys.cu
void attention(const OpContext&, const AttentionArgs&);
void choose_keys(const OpContext&, const AttentionArgs&, const KeyChoice&);
void choose_train_keys(const OpContext&, const TrainAttentionArgs&, const KeyChoice&);
void attention_selected(const OpContext&, const AttentionArgs&, const KeySelection&);
void attention_train(const OpContext&, const TrainAttentionArgs&);
void attention_train_backward(const OpContext&, const TrainAttentionArgs&);
void attention_selected_train(const OpContext&, const TrainAttentionArgs&, const KeySelection&);
void attention_selected_train_backward(const OpContext&, const TrainAttentionArgs&,
                                       const KeySelection&);

// sample.cu
void sample(const OpContext&, const SampleArgs&);

// loss.cu
void cross_entropy(const OpContext&, const CrossEntropyArgs&);
void kl_topk(const OpContext&, const KlTopkArgs&);

// update.cu
void adamw(const OpContext&, const AdamWArgs&);
void dot(const OpContext&, int64_t n, const float* x, const float* y, double* out);
void axpby(const OpContext&, int64_t n, float a, const float* x, float b, float* y);
void multiply_add(const OpContext&, int64_t n, float a, const float* x, const float* z, float* y);

}  // namespace ds::cuda
