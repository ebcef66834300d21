/* SPDX-License-Identifier: Apache-2.0 */
#include "ds/plugin.h"

/* A translation unit may not be empty in C. */
extern const size_t ds_tensor_size;
const size_t ds_tensor_size = sizeof(ds_tensor);
