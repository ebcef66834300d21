#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs every test that needs no GPU.
#
#   tests/run.sh                builds preset release (as quickstart.sh does) and runs all its tests
#   tests/run.sh --fast         only those labelled fast
#   tests/run.sh --sanitizers   first presets asan and tsan with the tests that suit them
#
# Needs Debian 12 and nothing else: what is missing is installed first. Exits 1 if anything failed; the
# release tests come last, so that their summary ends the output.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/setup.sh
. "$here/../examples/setup.sh"
cd "$ds_root"

fast=no sanitizers=no
for option in "$@"; do
  case $option in
    --fast) fast=yes ;;
    --sanitizers) sanitizers=yes ;;
    *) sed -n '3,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done

make_venv() {
  "$ds_python" -m venv build/venv && build/venv/bin/pip install -q --no-deps -r tests/e2e/requirements.txt
}

setup_venv() {
  # The list is copied in only after it has been installed: a broken installation is made anew.
  cmp -s tests/e2e/requirements.txt build/venv/installed.txt && return 0
  rm -rf build/venv
  phase "Python packages for the end-to-end tests" make_venv &&
    cp tests/e2e/requirements.txt build/venv/installed.txt
}

failed=()

# run_tests PRESET TARGET [CTEST ARGUMENT...]
run_tests() {
  local preset=$1 target=$2
  shift 2
  if ! setup_build "$preset" "$target"; then
    failed+=("the build of $preset")
  elif ! ctest --preset "$preset" -j2 "$@"; then
    failed+=("tests of $preset")
  fi
}

# clang: plugins are built with it, too, and the ABI is measured with it. cppcheck: a module runs it.
ds_packages+=(clang cppcheck)
setup_packages
setup_model
setup_venv

# Here, a test whose needs are missing has failed rather than been left out.
export DS_NO_SKIP=1
if [ "$sanitizers" = yes ]; then
  export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
  export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
  export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1:suppressions=$ds_root/tests/tsan.supp
  run_tests asan all
  run_tests tsan tests_tsan
fi
if [ "$fast" = yes ]; then
  run_tests release all -L '^fast$'
else
  run_tests release all
fi

if [ "${#failed[@]}" -gt 0 ]; then
  printf 'Failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
