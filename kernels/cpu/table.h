// SPDX-License-Identifier: Apache-2.0
// The body of every per-ISA file: define DS_ISA, include a simd_*.h, then this. Everything it makes
// lives in ds::DS_ISA, because an inline function shared by files with different flags would be
// linked once, with whichever flags came first. For the same reason no standard containers are used
// below here.
#pragma once

#include "kernels/cpu/attention.h"
#include "kernels/cpu/attention_selected.h"
#include "kernels/cpu/attention_train.h"
#include "kernels/cpu/choose_keys.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/loss.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/quant_feedback.h"
#include "kernels/cpu/quant_linear.h"
#include "kernels/cpu/quant_weights.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/update.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/sampling.h"

namespace ds::DS_ISA {

constexpr Ops table(const char* name) {
  return {.name = name,
          .host_memory = true,
          .reads_transposed = false,
          .rows_side_by_side = false,
          .fuses_phases = false,
          .allocate = host_allocate,
          .allocate_pinned = host_allocate,
          .release_pinned = host_release,
          .release = host_release,
          .upload = host_copy,
          .download = host_copy,
          .copy = host_copy,
          .zero = host_zero,
          .finish = host_finish,
          .recording_place = host_recording_place,
          .begin_recording = host_begin_recording,
          .end_recording = host_end_recording,
          .replay = host_replay,
          .release_recording = host_release_recording,
          .packed_bytes = packed_bytes,
          .pack = pack,
          .unpack = unpack,
          .pack_all = pack_all,
          .pack_factors = pack_factors,
          .prepared_bytes = prepared_bytes,
          .prepare = prepare,
          .linear = linear,
          .outer_accumulate = outer_accumulate,
          .rmsnorm = rmsnorm,
          .rmsnorm_backward = rmsnorm_backward,
          .rope_append = rope_append,
          .rope = rope,
          .attention = attention,
          .attention_train = attention_train,
          .attention_train_backward = attention_train_backward,
          .choose_keys = choose_keys,
          .choose_train_keys = choose_train_keys,
          .attention_selected = attention_selected,
          .attention_selected_train = attention_selected_train,
          .attention_selected_train_backward = attention_selected_train_backward,
          .swiglu = swiglu,
          .swiglu_backward = swiglu_backward,
          .relu = relu,
          .relu_backward = relu_backward,
          .embed = embed,
          .gather_rows = gather_rows,
          .scatter_rows = scatter_rows,
          .embed_backward = embed_backward,
          .sample = sample_rows,
          .cross_entropy = cross_entropy,
          .kl_topk = kl_topk,
          .adamw = adamw,
          .dot = dot,
          .axpby = axpby,
          .multiply_add = multiply_add};
}

constexpr QuantOps quant_table() {
  return {.fused_rows = 0,
          .quantize = quantize,
          .feedback_factor = feedback_factor,
          .dequantize = dequantize,
          .prepare = quant_prepare,
          .linear = quant_linear,
          .fake = fake_quantize,
          .fake_backward = fake_quantize_backward};
}

}  // namespace ds::DS_ISA
