// SPDX-License-Identifier: Apache-2.0
// The calls that a helper process answers.
#pragma once

#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "plugin/flat.h"
#include "plugin/isolation_wire.h"
#include "plugin/library.h"

namespace ds {

class HelperCalls {
 public:
  /// `stop` is ds_call.cancel of every call; a reply has at most `room` bytes.
  HelperCalls(uint32_t kind, std::string component, FileContent file, const uint32_t* stop,
              uint64_t room);
  std::string answer(std::string_view request);

 private:
  ds_code run(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out, ds_status* st);
  ds_code create(FlatReader& from, ds_status* st);
  ds_code describe(FlatWriter& out, ds_status* st);
  ds_code common(HelperOp op, FlatReader& from, FlatWriter& out, ds_status* st);
  ds_code tool(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out, ds_status* st);
  ds_code retriever(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                    ds_status* st);
  ds_code curriculum(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                     ds_status* st);
  ds_code quantizer(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                    ds_status* st);
  ds_code encoder(HelperOp op, FlatReader& from, const ds_call& call, FlatWriter& out,
                  ds_status* st);

  const uint32_t kind_;
  const std::string component_;
  FileContent file_;
  const uint32_t* const stop_;
  const uint64_t room_;
  PluginServices services_;
  std::shared_ptr<PluginInstance> instance_;
  struct Line {
    int32_t level;
    std::string component, text;
  };
  std::mutex lines_mutex_;
  std::vector<Line> lines_;
};

}  // namespace ds
