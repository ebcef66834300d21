// SPDX-License-Identifier: Apache-2.0
// What a helper process answered, read by the daemon: every byte is hostile. A reader gives the
// code of the call; what is wrong with the bytes it says to the FlatReader, and then nothing that
// it wrote counts.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "ds/plugin.h"
#include "plugin/flat.h"
#include "plugin/isolation_wire.h"

namespace ds {

/// Log lines of the plugin: level, text.
using HelperLog = std::function<void(int32_t level, std::string_view text)>;
/// Reads the results of a reply that says DS_OK; its code is the call's.
using ReplyReader = std::function<ds_code(FlatReader&)>;

struct JudgedReply {
  ds_code code = DS_OK;
  std::string garbage;  ///< why the reply cannot be believed; empty: it can
};
/// The whole of a reply: `read` gets its results. *st is filled unless it is garbage.
JudgedReply judge_reply(std::string_view reply, const HelperLog& log, const ReplyReader& read,
                        ds_status* st);
/// Says what is wrong in a call's status.
ds_code isolated_error(ds_status* st, ds_code code, std::string_view text, uint32_t flags = 0);

/// Bytes as they are.
ds_code read_sink(FlatReader& from, const ds_sink* sink);
/// Text for a sink that takes only text.
ds_code read_text_sink(FlatReader& from, const ds_sink* sink);
/// Passes each on to `emit`, whose code it returns.
ds_code read_findings(FlatReader& from, void* ctx, ds_code (*emit)(void*, const ds_finding*));
ds_code read_version(FlatReader& from, uint64_t* version);
ds_code read_hits(FlatReader& from, ds_hit* out, uint64_t max, uint64_t* n);
ds_code read_picks(FlatReader& from, uint64_t budget, uint64_t* keys, uint64_t* n);
ds_code read_difficulties(FlatReader& from, float* difficulty, uint64_t n);
/// Never says that something is fused: the daemon serves what dequantize gives.
ds_code read_format(FlatReader& from, ds_qformat* out);
/// Into the memory of `out`, as large as its format says.
ds_code read_weight(FlatReader& from, const ds_qweight& out);
/// The output's shape, at most `most_bytes` of FP32. No memory is asked for: the helper has its
/// own.
ds_code read_encoder_plan(FlatReader& from, uint64_t most_bytes, ds_plan* out);
/// FP32, all finite, as many bytes as `out` has.
ds_code read_finite(FlatReader& from, const ds_tensor& out, const char* not_finite);

}  // namespace ds
