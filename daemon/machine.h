// SPDX-License-Identifier: Apache-2.0
// What the model computes on, for each thread that does, and what takes over when it fails.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "device.h"
#include "engine/engine.h"
#include "events.h"
#include "metrics.h"
#include "plugin_setup.h"

namespace ds {

struct Machine {
  explicit Machine(EventBus& events)
      : state(system_clock_seam(),
              [this, &events](const DeviceState::View& now) { tell(now, events); }) {}
  /// `engine` hears when the GPU fails, now if it has.
  void tell_from_now_on(Engine& engine);
  void tell(const DeviceState::View& now, EventBus& events) const;
  /// The same on the CPU once the GPU is lost.
  const Compute& engine_now() const { return state.lost() ? host : engine; }

  std::unique_ptr<Device> device;
  DeviceState state;
  bool may_do_without = false;  ///< the CPU will do where the GPU cannot be had
  std::atomic<Engine*> told{nullptr};
  Gauge* lost = nullptr;
  ComponentsSlot components;
  Compute engine, host;
  OpContext learner;
  SharedCompute loader;
};

/// The device called `name`; the CPU where that cannot be had, if its name is auto or `do_without`
/// says that the CPU will do.
Result<std::unique_ptr<Machine>> open_machine(const std::string& name, bool do_without, Pool& pool,
                                              EventBus& events, Metrics& metrics);

}  // namespace ds
