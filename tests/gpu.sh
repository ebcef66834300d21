#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, on this machine: one line per row, the whole output in FOLDER/ROW.log.
#
#   tests/gpu.sh [--bin FOLDER] [--out FOLDER] [--anew] [ROW...]
#
#   --bin   programs of a build made elsewhere, beside its ../lib and ../modules (and ../tests/faulty
#           for faults and shortages); without it, this machine's own build of preset cuda, made first
#   --out   where the logs go and what is already done is kept (default build/gpu); a row that passed
#           there is not run again
#   --anew  all are
#   ROW     only these; --list names them all
#
# Needs no network. Exits 1 if a row failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

bin='' out=build/gpu anew=no rows=()
all=(ops parts plugins codes precision model engine engine-window-global memcheck racecheck initcheck parity parity-fp16 gap held-out
     decode-1 decode-8 decode-64 decode-256 logits-256 prefill-512 prefill-4096 decode-1-fp16 decode-256-fp16 prefill-4096-fp16
     decode-1-delta-fp16 decode-8-delta-fp16 decode-64-delta-fp16 prefill-512-delta-fp16
     decode-1-int8 decode-64-int8 decode-256-int8 prefill-512-int8 decode-1-int4 decode-64-int4 decode-256-int4 prefill-512-int4
     lora-8x64 lora-16x1024 full-4x512 full-16x1024 lora-8x64-fp16 full-4x512-fp16 full-16x1024-fp16 full-16x1024-tf32
     full-16x1024-fp32 share-lora-8x64 share-full-4x512
     attention-512 attention-4096 attention-2048+2048 attention-decode-1x256 attention-decode-256x256
     attention-decode-1x4096 attention-train-1x4096 attention-train-16x1024
     window-global-4096 window-global-2048+2048 window-global-decode-1x4096 window-global-decode-256x256
     window-global-train-1x4096 window-global-train-16x1024
     faults shortages)
while [ $# -gt 0 ]; do
  case $1 in
    --bin) bin=$2; shift ;;
    --out) out=$2; shift ;;
    --anew) anew=yes ;;
    --list) printf '%s\n' "${all[@]}"; exit 0 ;;
    -*) sed -n '3,16s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) rows+=("$1") ;;
  esac
  shift
done
[ "${#rows[@]}" -gt 0 ] || rows=("${all[@]}")
mkdir -p "$out"

if ! nvidia-smi -L >/dev/null 2>&1; then
  echo "No GPU here (nvidia-smi -L finds none): nothing was run."
  exit 77
fi
if [ -z "$bin" ]; then
  bin=build/cuda/bin
  targets=(ops_test attention_gpu_test mixed_precision_test quant_test quantized_model_test smollm2_test engine_test
           gpu_bench dsd dsctl breaker gpu_hog)
  { cmake --preset cuda && cmake --build --preset cuda --target "${targets[@]}"; } >"$out/build.log" 2>&1 ||
    { echo "build: FAILED, see $out/build.log"; exit 1; }
fi

sanitizer() {
  compute-sanitizer --tool "$1" --error-exitcode 9 "$bin/ops_test" --gtest_filter='*cuda*' &&
    compute-sanitizer --tool "$1" --error-exitcode 9 "$bin/quant_test" --gtest_filter='*cuda*'
}

run_row() {
  case $1 in
    # Without a case for the GPU it says why and would pass.
    ops) "$bin/ops_test" --gtest_filter='*cuda*' && "$bin/ops_test" --gtest_list_tests | grep -q cuda ;;
    # The same on a stream that changes to another part of the GPU before each op.
    parts) DS_TEST_GPU_PARTS=1 "$bin/ops_test" --gtest_filter='*cuda*' ;;
    # Attention by the built-in plugins, recorded and replayed too.
    plugins) "$bin/attention_gpu_test" ;;
    # What each product of a training step multiplies, and what falls back.
    precision) DS_TEST_DEVICE=cuda:0 "$bin/mixed_precision_test" ;;
    # Weights of 8 and 4 bits: the kernels, then a model that serves and trains over them.
    codes)
      "$bin/quant_test" --gtest_filter='*cuda*' && DS_TEST_DEVICE=cuda:0 "$bin/quantized_model_test" &&
        "$bin/quant_test" --gtest_list_tests | grep -q cuda
      ;;
    # Against PyTorch's references; needs DS_MODEL. Left out here and below are the tests that want equal
    # bits whatever the company: that is the CPU's promise (kernels/README.md).
    model) DS_TEST_DEVICE=cuda:0 "$bin/smollm2_test" --gtest_filter='-*SameBits*' ;;
    engine | engine-window-global)
      [ "$1" = engine ] || export DS_TEST_ATTENTION=window-global
      DS_TEST_DEVICE=cuda:0 "$bin/engine_test" \
        --gtest_filter="-*Bits:*MoreVersionsThanSlots*:*SwapsUnderStreams*:*EmbeddingsAreMeans*${DS_TEST_ATTENTION:+:*Reference*}"
      ;;
    memcheck | racecheck | initcheck) sanitizer "$1" ;;
    # The real dsd while its GPU fails, or has no memory, 20 times each; needs DS_MODEL.
    faults | shortages) DS_BIN_DIR=$bin python3 tests/e2e/gpu_faults.py "$1" ;;
    *) "$bin/gpu_bench" "$1" ;;
  esac
}

failed=0
for row in "${rows[@]}"; do
  if [ $anew = no ] && [ -e "$out/$row.ok" ]; then
    echo "$row: done before"
    continue
  fi
  start=$SECONDS
  limit=240
  case $row in faults | shortages) limit=500 ;; esac
  if timeout "${DS_GPU_ROW_S:-$limit}" bash -c "$(declare -f run_row sanitizer); bin=$bin run_row $row" >"$out/$row.log" 2>&1; then
    touch "$out/$row.ok"
    if grep -q "^$row:" "$out/$row.log"; then grep "^$row:" "$out/$row.log"; else echo "$row: ok ($((SECONDS - start)) s)"; fi
  else
    echo "$row: FAILED (exit $?, $((SECONDS - start)) s): $(grep -m1 -iE 'failure|error|fail' "$out/$row.log" | cut -c1-160)"
    failed=1
  fi
done
exit $failed
