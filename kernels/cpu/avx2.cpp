// SPDX-License-Identifier: Apache-2.0
#define DS_ISA cpu_avx2
#include "kernels/cpu/simd_avx2.h"
#include "kernels/cpu/table.h"

namespace ds {

extern const Ops kOps_avx2;
constinit const Ops kOps_avx2 = cpu_avx2::table("cpu-avx2");
extern const QuantOps kQuant_avx2;
constinit const QuantOps kQuant_avx2 = cpu_avx2::quant_table();

}  // namespace ds
