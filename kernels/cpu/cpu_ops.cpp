// SPDX-License-Identifier: Apache-2.0
// Which of the compiled tables this machine can run, and which it should.
#include <cstring>

#include "ds/status.h"
#include "kernels/cpu/vnni.h"
#include "kernels/quant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ds {

extern const Ops kOps_scalar;
extern const QuantOps kQuant_scalar;

#if defined(__x86_64__)
extern const Ops kOps_avx2, kOps_avx512, kOps_avx512_bf16, kOps_avx512_amx;
extern const QuantOps kQuant_avx2, kQuant_avx512, kQuant_avx512_bf16, kQuant_avx512_amx;

namespace {

bool is_amd() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0) return false;
  char vendor[12];
  std::memcpy(vendor, &ebx, 4);
  std::memcpy(vendor + 4, &edx, 4);
  std::memcpy(vendor + 8, &ecx, 4);
  return std::memcmp(vendor, "AuthenticAMD", 12) == 0;
}

/// The CPU has AMX tiles with BF16 products, and the kernel lets this process use them: tile state
/// is granted on request only (Linux, Documentation/arch/x86/xstate.rst).
bool has_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool cpu_supports(CpuIsa isa) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case CpuIsa::kScalar:
      return true;
    case CpuIsa::kAvx2:
      return avx2;
    case CpuIsa::kAvx512:
      return avx512;
    case CpuIsa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case CpuIsa::kAvx512Amx: {
      static const bool tiles = has_tiles();
      return avx512 && __builtin_cpu_supports("avx512bf16") && tiles;
    }
  }
  return false;
}

CpuIsa best_cpu_isa() {
  if (cpu_supports(CpuIsa::kAvx512Amx)) return CpuIsa::kAvx512Amx;
  if (cpu_supports(CpuIsa::kAvx512Bf16) && is_amd()) return CpuIsa::kAvx512Bf16;
  if (cpu_supports(CpuIsa::kAvx512)) return CpuIsa::kAvx512;
  if (cpu_supports(CpuIsa::kAvx2)) return CpuIsa::kAvx2;
  return CpuIsa::kScalar;
}

const Ops& cpu_ops(CpuIsa isa) {
  DS_CHECK(cpu_supports(isa));
  switch (isa) {
    case CpuIsa::kScalar:
      return kOps_scalar;
    case CpuIsa::kAvx2:
      return kOps_avx2;
    case CpuIsa::kAvx512:
      return kOps_avx512;
    case CpuIsa::kAvx512Bf16:
      return kOps_avx512_bf16;
    case CpuIsa::kAvx512Amx:
      return kOps_avx512_amx;
  }
  return kOps_scalar;
}

const QuantOps& cpu_quant_ops(CpuIsa isa) {
  DS_CHECK(cpu_supports(isa));
  switch (isa) {
    case CpuIsa::kScalar:
      return kQuant_scalar;
    case CpuIsa::kAvx2:
      return kQuant_avx2;
    case CpuIsa::kAvx512:
      return kQuant_avx512;
    case CpuIsa::kAvx512Bf16:
      return kQuant_avx512_bf16;
    case CpuIsa::kAvx512Amx:
      return kQuant_avx512_amx;
  }
  return kQuant_scalar;
}

bool cpu_has_vnni() {
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has;
}

#else

bool cpu_supports(CpuIsa isa) { return isa == CpuIsa::kScalar; }
CpuIsa best_cpu_isa() { return CpuIsa::kScalar; }
const Ops& cpu_ops(CpuIsa isa) {
  DS_CHECK(cpu_supports(isa));
  return kOps_scalar;
}
const QuantOps& cpu_quant_ops(CpuIsa isa) {
  DS_CHECK(cpu_supports(isa));
  return kQuant_scalar;
}
bool cpu_has_vnni() { return false; }

#endif

}  // namespace ds
