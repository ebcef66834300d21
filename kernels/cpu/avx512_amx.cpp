// SPDX-License-Identifier: Apache-2.0
#define DS_ISA cpu_avx512_amx
#include "kernels/cpu/simd_avx512.h"
#include "kernels/cpu/table.h"

namespace ds {

extern const Ops kOps_avx512_amx;
constinit const Ops kOps_avx512_amx = cpu_avx512_amx::table("cpu-avx512-amx");
extern const QuantOps kQuant_avx512_amx;
constinit const QuantOps kQuant_avx512_amx = cpu_avx512_amx::quant_table();

}  // namespace ds
