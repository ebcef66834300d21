// SPDX-License-Identifier: Apache-2.0
// The OpenAI-compatible routes: chat completions, completions, embeddings, models.
#pragma once

#include "serve/router.h"
#include "serve/service.h"

namespace ds {

/// Each route with and without the /v1 prefix. `service` outlives the router.
void add_openai_routes(Router& router, Service& service);

/// POST /v1/embeddings (embeddings.cpp).
void embeddings(Service& service, RouteCall& call, const ResponderPtr& responder);

}  // namespace ds
