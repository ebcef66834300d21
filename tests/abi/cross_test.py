#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Old and new plugins in old and new hosts give the same bytes.

  cross_test.py FOLDER   holds abi_host_MINOR and <plugin>_MINOR.so of each of MINORS"""
import pathlib
import subprocess
import sys

PLUGINS = {"abi_row_int8": ("C++", 4), "abi_block_int4": ("C", 4), "abi_sliding_window": ("C++", 2)}


MINORS = ("1_0", "1_1", "1_2")


def main(folder):
    failed = 0
    for plugin, (language, lines) in PLUGINS.items():
        results = {}
        for host in MINORS:
            for built in MINORS:
                run = subprocess.run([folder / f"abi_host_{host}", folder / f"{plugin}_{built}.so"],
                                     capture_output=True, text=True)
                expected = f"host {host.replace('_', '.')}, plugin {built.replace('_', '.')}\n"
                results[host, built] = run.stdout
                if run.returncode != 0 or run.stderr != expected or len(run.stdout.splitlines()) != lines:
                    print(f"{plugin} ({language}), host {host}, plugin {built}: exit {run.returncode}, "
                          f"expected 0 and {lines} lines\n{run.stderr}{run.stdout}")
                    failed += 1
        if len(set(results.values())) != 1:
            print(f"{plugin} ({language}): the combinations differ: {results}")
            failed += 1
        print(f"{plugin} ({language}): {len(results)} combinations\n{results['1_0', '1_0']}", end="")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(pathlib.Path(sys.argv[1])) else 0)
