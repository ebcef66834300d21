// SPDX-License-Identifier: Apache-2.0
#include "ds/plugin.h"
