// SPDX-License-Identifier: Apache-2.0
// Dense attention that breaks the GPU when it is told to: where $DS_BREAK_GPU names a folder and
// there is a file `fault` in it, which it takes away, the next pass also writes where no memory is.
#include <unistd.h>

#include <cstdlib>

#include "ds/plugin.hpp"

// The module itself, but for its entry.
#pragma push_macro("DS_PLUGIN")
#undef DS_PLUGIN
#define DS_PLUGIN(...)
#include "modules/attention/dense.cpp"
#pragma pop_macro("DS_PLUGIN")

namespace ds::test {

struct Breaker : modules::Dense {
  static constexpr std::string_view name = "breaker";
  static constexpr std::string_view summary = "dense attention that breaks the GPU on demand";
  using Dense::Dense;

  void prefill(const ds_call& call, const ds_attn_args& a) const {
    Dense::prefill(call, a);
    const char* const folder = std::getenv("DS_BREAK_GPU");
    if (call.stream == nullptr || folder == nullptr) return;
    if (unlink((std::string(folder) + "/fault").c_str()) != 0) return;
    constexpr std::uintptr_t kNowhere = 0x100;
    loaded_cuda_backend()->ops->relu(modules::op_context(call), 64,
                                     reinterpret_cast<float*>(kNowhere));
  }
};

}  // namespace ds::test

DS_PLUGIN("org.driftstone.test-breaker", "1.0.0", "Apache-2.0", ds::test::Breaker)
