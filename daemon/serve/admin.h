// SPDX-License-Identifier: Apache-2.0
// The daemon's own routes under /ds/v1, and /health, /ready, /metrics. `service` outlives the
// router.
#pragma once

#include "serve/router.h"
#include "serve/service.h"

namespace ds {

void add_version_routes(Router& router,
                        Service& service);  ///< versions, models (admin_versions.cpp)
void add_learn_routes(Router& router,
                      Service& service);  ///< learn, replay, backup, config (admin.cpp)
void add_plugin_routes(Router& router, Service& service);    ///< plugins (admin_plugins.cpp)
void add_feedback_routes(Router& router, Service& service);  ///< feedback in and out (feedback.cpp)
void add_status_routes(Router& router, Service& service);    ///< what is going on (observe.cpp)

/// Gauges that are read when /metrics is: build, serving version, store. The collector holds the
/// service weakly, because the metrics outlive it.
void register_collectors(const std::shared_ptr<Service>& service);

}  // namespace ds
