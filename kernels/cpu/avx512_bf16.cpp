// SPDX-License-Identifier: Apache-2.0
#define DS_ISA cpu_avx512_bf16
#include "kernels/cpu/simd_avx512.h"
#include "kernels/cpu/table.h"

namespace ds {

extern const Ops kOps_avx512_bf16;
constinit const Ops kOps_avx512_bf16 = cpu_avx512_bf16::table("cpu-avx512-bf16");
extern const QuantOps kQuant_avx512_bf16;
constinit const QuantOps kQuant_avx512_bf16 = cpu_avx512_bf16::quant_table();

}  // namespace ds
