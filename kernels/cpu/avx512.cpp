// SPDX-License-Identifier: Apache-2.0
#define DS_ISA cpu_avx512
#include "kernels/cpu/simd_avx512.h"
#include "kernels/cpu/table.h"

namespace ds {

extern const Ops kOps_avx512;
constinit const Ops kOps_avx512 = cpu_avx512::table("cpu-avx512");
extern const QuantOps kQuant_avx512;
constinit const QuantOps kQuant_avx512 = cpu_avx512::quant_table();

}  // namespace ds
