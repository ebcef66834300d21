// SPDX-License-Identifier: Apache-2.0
// Which tables the tests run.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "kernels/cuda/backend.h"
#include "tests/kernels/cases.h"

namespace ds::test {

CpuIsa isa_named(const std::string& name) {
  for (CpuIsa isa : supported_isas()) {
    if (cpu_ops(isa).name == "cpu-" + name) return isa;
  }
  std::fprintf(stderr, "this machine cannot run '%s'\n", name.c_str());
  std::exit(2);
}

bool rounds_to_bf16(const Ops& ops) { return ops.prepared_bytes(WeightFormat::kBF16, 64, 2) > 0; }

std::vector<CpuIsa> supported_isas() {
  std::vector<CpuIsa> all;
  for (CpuIsa isa :
       {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16, CpuIsa::kAvx512Amx}) {
    if (cpu_supports(isa)) all.push_back(isa);
  }
  return all;
}

namespace {

/// Another part of the GPU for each op.
GpuPart next_part(void*) {
  static constexpr GpuPart kTurns[] = {GpuPart::kMost, GpuPart::kWhole, GpuPart::kHalf,
                                       GpuPart::kThreeQuarters, GpuPart::kQuarter};
  static size_t turn = 0;
  return kTurns[turn++ % std::size(kTurns)];
}

/// Why not, in one line, where it cannot be.
void add_gpu(std::vector<TestedBackend>* all) {
  const auto why_not = [](const std::string& why) {
    std::printf("No tests on a GPU: %s\n", why.c_str());
  };
  const auto own = std::filesystem::canonical("/proc/self/exe").parent_path();
  const auto file = own.parent_path() / "lib/libds_cuda.so";
  if (!std::filesystem::exists(file)) return why_not("this build has no CUDA backend");
  const auto loaded = load_cuda_backend(file.string());
  if (!loaded.ok()) return why_not(loaded.status().message());
  const CudaBackend& cuda = **loaded;
  if (const char* failed = cuda.open(0); failed != nullptr) return why_not(failed);
  void* stream = cuda.stream_create(false);
  DS_CHECK(stream != nullptr);
  if (std::getenv("DS_TEST_GPU_PARTS") != nullptr) {
    const char* whole = cuda.stream_give_way(stream, {next_part});
    if (whole != nullptr) std::fprintf(stderr, "%s\n", whole);
    DS_CHECK(whole == nullptr);
  }
  case_memory() = {cuda.allocate_shared, cuda.ops->release};
  all->push_back({cuda.ops, {nullptr, stream, 0}, cuda.quant});
}

}  // namespace

const std::vector<TestedBackend>& tested_backends() {
  static const std::vector<TestedBackend> backends = [] {
    std::vector<TestedBackend> all;
    for (const CpuIsa isa : supported_isas())
      all.push_back({&cpu_ops(isa), {}, &cpu_quant_ops(isa)});
    add_gpu(&all);
    return all;
  }();
  return backends;
}

std::string backend_label(const TestedBackend& backend) {
  std::string label = backend.ops->name;
  std::replace(label.begin(), label.end(), '-', '_');
  return label;
}

}  // namespace ds::test
