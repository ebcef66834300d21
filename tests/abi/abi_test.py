#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The header keeps the promise of sdk/README.md: it has the layout of each release, and only ever grows.

  abi_test.py            needs clang; without it the tests are skipped"""
import pathlib
import shutil
import sys
import tempfile
import unittest

import abi

HERE = pathlib.Path(__file__).resolve().parent
SDK = HERE.parent.parent / "sdk" / "include"
RELEASES = sorted(HERE.glob("v1.*.layout"), key=lambda file: int(file.stem.split(".")[1]))
LAST = RELEASES[-1]


def minor_of(text):
    return next(iter(abi.parsed(text)["minor"]))


class Layout(unittest.TestCase):
    def changed(self, kind):
        with tempfile.TemporaryDirectory() as folder:
            abi.variant(kind, HERE / "headers" / LAST.stem[1:], folder)
            return abi.layout(folder)

    def test_kept_headers_have_the_kept_layout(self):
        self.assertTrue(RELEASES)
        for file in RELEASES:
            self.assertEqual(abi.layout(HERE / "headers" / file.stem[1:]), file.read_text(), file.name)

    def test_todays_header_grew_from_every_release(self):
        today = abi.layout(SDK)
        for file in RELEASES:
            old = file.read_text()
            self.assertEqual(abi.breaks(old, today), [], f"against {file.name}")
            if minor_of(old) == minor_of(today):
                self.assertEqual(old, today, f"{file.name}: a change needs a new DS_ABI_MINOR")

    def test_a_field_at_the_end_of_each_growable_struct_is_growth(self):
        old, new = LAST.read_text(), self.changed("grown")
        tails = [name for name in abi.parsed(new)["field"] if name.endswith(".tail")]
        sized = [n for n, v in abi.parsed(old)["field"].items() if n.endswith(".size") and v.startswith("0 ")]
        self.assertEqual(len(tails), len(sized))
        self.assertEqual(abi.breaks(old, new), [])

    def test_insert_widen_and_renumber_are_refused_by_name(self):
        old = LAST.read_text()
        for kind, name in (("insert", "ds_quantizer.format: "), ("widen", "ds_qformat.rel_tol: "),
                           ("renumber", "enum DS_F8_E5M2: was 12, is 16")):
            found = abi.breaks(old, self.changed(kind))
            self.assertTrue(found and found[0].startswith(name), f"{kind}: {found}")

    def test_what_is_gone_or_frozen_is_refused(self):
        old = LAST.read_text()
        without = "".join(l for l in old.splitlines(True) if not l.startswith(("struct ds_hit ", "field ds_hit.", "enum DS_E_BUSY ")))
        self.assertEqual(abi.breaks(old, without), ["ds_hit: is gone", "enum DS_E_BUSY: was 7, is gone"])
        more = old.replace("struct ds_hit 16\n", "struct ds_hit 24\n").replace(
            "field ds_hit.flags 12 4 uint32_t\n",
            "field ds_hit.flags 12 4 uint32_t\nfield ds_hit.more 16 8 uint64_t\n")
        self.assertEqual(abi.breaks(old, more),
                         ["ds_hit.more: a struct without size may not grow, 16 to 24 bytes"])


if __name__ == "__main__":
    if shutil.which("clang") is None:
        print("skipped: no clang")
        sys.exit(77)
    unittest.main()
