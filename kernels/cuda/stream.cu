// SPDX-License-Identifier: Apache-2.0
// A stream's scratch and cuBLAS, and how it gives way: a short queue, and a change of parts between
// two ops, which an event orders.
#include "kernels/cuda/partition.h"
#include "kernels/cuda/state.h"

namespace ds::cuda {

StreamState::StreamState(cudaStream_t whole, bool owned, int priority)
    : current_(&lane_of(GpuPart::kWhole)), owned_(owned), priority_(priority) {
  current_->stream = whole;
  current_->tried = current_->ready = true;
}

bool StreamState::has(void* native) const {
  for (const Lane& lane : lanes_) {
    if (lane.stream == native) return true;
  }
  return false;
}

bool StreamState::init() {
  return check(cudaMalloc(&scratch_, kScratchBytes), "scratch of a stream") &&
         check(cudaMalloc(&blas_scratch_, kBlasBytes), "cuBLAS scratch of a stream") &&
         check(make_blas(*current_), "handle");
}

cublasStatus_t StreamState::make_blas(Lane& lane) const {
  // cublasSetStream forgets the workspace, so the order matters. Without a workspace of its own
  // cuBLAS would allocate, which a capture forbids. Lanes take turns, so they can share one.
  cublasStatus_t status = cublasCreate(&lane.blas);
  if (status == CUBLAS_STATUS_SUCCESS) status = cublasSetStream(lane.blas, lane.stream);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasSetWorkspace(lane.blas, blas_scratch_, kBlasBytes);
  return status;
}

StreamState::~StreamState() {
  cudaStreamSynchronize(stream());
  for (Lane& lane : lanes_) {
    if (lane.blas != nullptr) cublasDestroy(lane.blas);
    const bool ours = &lane != &lane_of(GpuPart::kWhole) || owned_;
    if (ours && lane.stream != nullptr) cudaStreamDestroy(lane.stream);
  }
  for (cudaEvent_t event : {marks_[0], marks_[1], marks_[2], changed_}) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  cudaFree(blas_scratch_);
  cudaFree(scratch_);
}

const char* StreamState::open_lane(GpuPart part) {
  Lane& lane = lane_of(part);
  lane.tried = true;
  int sms = 0;
  cudaStream_t stream = nullptr;
  const char* failed = stream_on(part, priority_, &stream, &sms);
  if (failed != nullptr) return failed;
  lane.stream = stream;
  if (make_blas(lane) == CUBLAS_STATUS_SUCCESS &&
      cublasSetSmCountTarget(lane.blas, sms) == CUBLAS_STATUS_SUCCESS) {
    lane.ready = true;
    return nullptr;
  }
  if (lane.blas != nullptr) cublasDestroy(std::exchange(lane.blas, nullptr));
  lane.stream = nullptr;
  cudaStreamDestroy(stream);
  return "cuBLAS does not run on a part of the GPU";
}

const char* StreamState::set_gate(StreamGate gate) {
  for (cudaEvent_t& mark : marks_) {
    if (mark == nullptr && !check(cudaEventCreate(&mark), "event")) return "no events";
  }
  if (changed_ == nullptr &&
      !check(cudaEventCreateWithFlags(&changed_, cudaEventDisableTiming), "event"))
    return "no events";
  gate_ = gate;
  if (gate.pass == nullptr) {
    use(GpuPart::kWhole);
    return nullptr;
  }
  // Now, since a context takes milliseconds to make.
  for (const GpuPart part : {GpuPart::kHalf, GpuPart::kThreeQuarters, GpuPart::kMost}) {
    const char* failed = lane_of(part).ready ? nullptr : open_lane(part);
    if (failed != nullptr) return failed;
  }
  return nullptr;
}

void StreamState::give_way() {
  if (gate_.pass == nullptr || recording_) return;
  if (pace_.mark_due()) mark();
  use(gate_.pass(gate_.user));  // after the wait for a mark, so that it is the latest word
}

/// Ends a stretch of ops; then waits until at most this one is before the GPU.
void StreamState::mark() {
  const auto at = [&](int64_t i) { return marks_[i % 3]; };
  const int64_t last = n_marks_++;
  if (!check(cudaEventRecord(at(last), stream()), "mark") || last < 2) return;
  const bool waits = cudaEventQuery(at(last - 1)) == cudaErrorNotReady;
  cudaGetLastError();  // being not ready is no failure
  if (waits && !check(cudaEventSynchronize(at(last - 1)), "what was enqueued")) return;
  float ms = 0;
  const bool timed = cudaEventElapsedTime(&ms, at(last - 2), at(last - 1)) == cudaSuccess;
  if (!timed) cudaGetLastError();
  pace_.reached(waits, timed ? static_cast<double>(ms) * 1e3 : Pace::kStretchUs);
}

void StreamState::use(GpuPart part) {
  if (!lane_of(part).tried) open_lane(part);
  Lane& next = lane_of(part).ready ? lane_of(part) : lane_of(GpuPart::kWhole);
  if (&next == current_) return;
  if (check(cudaEventRecord(changed_, stream()), "leaving a part") &&
      check(cudaStreamWaitEvent(next.stream, changed_, 0), "coming to a part"))
    current_ = &next;
}

}  // namespace ds::cuda
