// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include "log.h"

namespace ds {

void Machine::tell_from_now_on(Engine& engine_told) {
  told = &engine_told;
  if (state.lost()) engine_told.leave_device();
}

void Machine::tell(const DeviceState::View& now, EventBus& events) const {
  const bool just_lost = now.phase == DeviceState::Phase::kLost;
  this->lost->set(1);
  if (just_lost) {
    log(LogLevel::kError, "device",
        device->name() + " is lost: " + now.reason + "; what runs goes on on the CPU");
    if (Engine* engine_told = told; engine_told != nullptr) engine_told->leave_device();
  } else {
    const int64_t ms = (system_clock_seam().monotonic_ns() - now.since_ns) / 1'000'000;
    log(LogLevel::kWarn, "device",
        "the CPU serves, " + std::to_string(ms) + " ms after the GPU was lost");
  }
  events.publish("device", {{"event", just_lost ? "lost" : "cpu_serves"},
                            {"device", device->name()},
                            {"reason", now.reason},
                            {"since_ms", now.since_ms}});
}

namespace {

Status open_contexts(Machine& m, Pool& pool) {
  m.engine = {&m.device->ops(), {}, &m.components, &m.state};
  m.loader.compute = m.engine;
  DS_ASSIGN(m.engine.context, m.device->context(pool.engine(), true));
  DS_ASSIGN(m.learner, m.device->context(pool.background(), false, &pool.gpu_share()));
  DS_ASSIGN(m.loader.compute.context, m.device->context(serial_parallel(), false));
  return {};
}

/// The device that is asked for, or the CPU if that will do; the choice goes to the log in one
/// line.
Status open_device(const std::string& name, Machine& m, Pool& pool) {
  const std::string backend = (own_folder().parent_path() / "lib/libds_cuda.so").string();
  const auto open = [&](const std::string& which) -> Status {
    DS_ASSIGN(m.device, Device::open(which, backend));
    return open_contexts(m, pool);
  };
  const Status opened = open(name);
  std::string why;
  if (!opened.ok()) {
    if (!m.may_do_without) return opened;
    why = opened.message();
    DS_TRY(open("cpu"));
  } else {
    why = m.device->why_not_gpu();
  }
  log(LogLevel::kInfo, "device", m.device->name() + (why.empty() ? "" : "; " + why));
  if (!m.device->why_not_parted().empty())
    log(LogLevel::kWarn, "device", "training shares every SM: " + m.device->why_not_parted());
  return {};
}

}  // namespace

Result<std::unique_ptr<Machine>> open_machine(const std::string& device, bool do_without,
                                              Pool& pool, EventBus& events, Metrics& metrics) {
  auto m = std::make_unique<Machine>(events);
  m->may_do_without = do_without || device == "auto";
  const Ops& cpu = cpu_ops(best_cpu_isa());
  m->host = {&cpu, {pool.engine()}, &m->components, &m->state};
  m->loader.host = {&cpu, {serial_parallel()}, &m->components, &m->state};
  m->lost = &metrics.gauge("ds_device_lost", "1 while the CPU serves in the place of a GPU");
  DS_TRY(open_device(device, *m, pool));
  return m;
}

}  // namespace ds
