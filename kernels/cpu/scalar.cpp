// SPDX-License-Identifier: Apache-2.0
#define DS_ISA cpu_scalar
#include "kernels/cpu/simd_scalar.h"
#include "kernels/cpu/table.h"

namespace ds {

extern const Ops kOps_scalar;
constinit const Ops kOps_scalar = cpu_scalar::table("cpu-scalar");
extern const QuantOps kQuant_scalar;
constinit const QuantOps kQuant_scalar = cpu_scalar::quant_table();

}  // namespace ds
