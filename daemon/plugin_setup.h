// SPDX-License-Identifier: Apache-2.0
// Where plugins meet the settings and the engine: which of them serve, at start and when settings
// or generations change.
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <string>

#include "config.h"
#include "engine/bases.h"
#include "engine/versions.h"
#include "events.h"
#include "metrics.h"
#include "plugin/plugins.h"

namespace ds {

/// The file of this program, and where it is.
std::filesystem::path own_program();
std::filesystem::path own_folder();

/// For threads that compute beside the engine's, one at a time: they hold the mutex.
struct SharedCompute {
  Compute compute, host;  ///< `host` takes over when the device of the other is lost
  std::mutex mutex;
  const Compute& now() const {
    return compute.device != nullptr && compute.device->lost() ? host : compute;
  }
};

/// The modules beside this program and what `data` says was installed; `slot` gets the
/// attention and encoder that the settings name, which have to compute where the model does.
/// `metrics` outlives them.
Result<std::unique_ptr<Plugins>> open_plugins(const std::string& data, const Config& config,
                                              Metrics& metrics, EventBus& events,
                                              ComponentsSlot& slot, bool on_gpu);
/// What model.quant means, with the components that `slot` has now.
Result<WeightForm> weight_form(Plugins& plugins, const Config& config, const ComponentsSlot& slot,
                               bool on_gpu);

/// From now on new sequences take what serve.attention, serve.encoder and model.quant are set to,
/// and the newest generation of it. A setting that cannot be applied is refused. What has to be
/// tried out before is computed by `loader`.
void follow_plugins(Plugins& plugins, Config& config, ComponentsSlot& slot, Bases& bases,
                    Versions& versions, EventBus& events, SharedCompute& loader);

}  // namespace ds
