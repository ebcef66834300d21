// SPDX-License-Identifier: Apache-2.0
// Where the fields of each size-prefixed struct end: the sizes at which another version of the
// header could have cut it (R1 of ds/plugin.h). A struct that grows gets its new fields here.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "ds/plugin.h"

namespace ds::check {

template <class T>
struct Fields;  // static constexpr std::array ends

#define DS_FIELD_ENDS(T, ...)                                            \
  template <>                                                            \
  struct Fields<T> {                                                     \
    using S = T;                                                         \
    static constexpr auto ends = std::to_array<uint32_t>({__VA_ARGS__}); \
    static_assert(ends.back() == sizeof(T), "a field is missing");       \
  };
#define E(f) DS_SIZE_TO(S, f)

DS_FIELD_ENDS(ds_call, E(flags), E(parallel), E(stream), E(workspace), E(workspace_bytes),
              E(cancel), E(deadline_ns), E(seed), E(step), E(device_seed_step), E(request_id),
              E(generation))
DS_FIELD_ENDS(ds_parallel, E(threads), E(ctx), E(run))
DS_FIELD_ENDS(ds_sink, E(flags), E(ctx), E(write))
DS_FIELD_ENDS(ds_source, E(flags), E(ctx), E(read))
DS_FIELD_ENDS(ds_host, E(abi_minor), E(ctx), E(name), E(version), E(get_interface), E(log_enabled),
              E(log), E(alloc), E(dealloc), E(thread_enter), E(thread_leave), E(metric),
              E(config_int), E(config_number), E(config_text), E(config_json))
DS_FIELD_ENDS(ds_plan, E(flags), E(workspace_bytes), E(saved_bytes), E(page_extra_bytes),
              E(prepared_bytes), E(shape))
DS_FIELD_ENDS(ds_media, E(modality), E(data), E(rate), E(start_s), E(weight), E(flags))
DS_FIELD_ENDS(ds_encode_args, E(flags), E(media), E(tensors), E(out), E(saved), E(dout),
              E(dtensors))
DS_FIELD_ENDS(ds_kv_view, E(page_tokens), E(k_pages), E(v_pages), E(k_scale), E(v_scale),
              E(block_table), E(lengths), E(page_extra))
DS_FIELD_ENDS(ds_train_view, E(flags), E(k), E(v), E(prefix_k), E(prefix_v))
DS_FIELD_ENDS(ds_attn_args, E(flags), E(batch), E(layer), E(max_rows), E(max_keys), E(q), E(rows),
              E(kv), E(train), E(out), E(lse), E(scale), E(softcap), E(global_idx), E(dout), E(dq),
              E(dk), E(dv), E(saved), E(out_16))
DS_FIELD_ENDS(ds_qformat, E(layout_id), E(bits), E(group), E(scale_dtype), E(symmetric),
              E(packed_bytes), E(scale_bytes), E(zero_bytes), E(rel_tol), E(fused))
DS_FIELD_ENDS(ds_qweight, E(flags), E(n), E(k), E(format), E(packed), E(scales), E(zeros))
DS_FIELD_ENDS(ds_linear_args, E(epilogue), E(rows), E(x), E(x_stride), E(x_prepared), E(weights),
              E(bias), E(y), E(y_stride), E(residual), E(lora), E(n_weights), E(reserved), E(norm),
              E(rope), E(norm_eps), E(reserved1))
DS_FIELD_ENDS(ds_round, E(flags), E(round), E(seed), E(n_fresh), E(n_replay), E(max_steps),
              E(replay_ratio), E(reserved))
DS_FIELD_ENDS(ds_vectors, E(flags), E(ctx), E(make), E(copy), E(scale), E(axpy), E(multiply),
              E(dot))
DS_FIELD_ENDS(ds_step_report, E(flags), E(step), E(loss), E(gradient_norm), E(samples),
              E(n_samples))
#undef E
#undef DS_FIELD_ENDS

}  // namespace ds::check
