// SPDX-License-Identifier: Apache-2.0
// A stream's scratch and products, and how it gives way: a short queue, and a change of parts
// between two ops, which an event orders.
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
         check(Products::open(), "handle");
}

bool StreamState::multiply(const Product& product, const char* what) const {
  // Lanes take turns, so they can share a workspace.
  return check(products_.run(product, blas_scratch_, current_->sms, stream()), what);
}

StreamState::~StreamState() {
  cudaStreamSynchronize(stream());
  for (Lane& lane : lanes_) {
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
  cudaStream_t stream = nullptr;
  const char* failed = stream_on(part, priority_, &stream, &lane.sms);
  if (failed != nullptr) return failed;
  lane.stream = stream;
  lane.ready = true;
  return nullptr;
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
