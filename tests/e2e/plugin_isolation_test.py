# SPDX-License-Identifier: Apache-2.0
"""Tools run in a helper process of the daemon: killing it costs at most the call that it was answering."""
import json
import os
import pathlib
import signal
import tempfile
import time
import unittest

from daemon import Daemon, tiny_chat_model

CODE = {"language": "c++", "path": "a.cpp", "text": "int f() {\n  int a[2];\n  return a[3];\n}\n"}


def running(pid):
    """Whether it lives; one that only waits for its end to be noticed does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


class PluginIsolation(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="ds-isolation-")
        self.addCleanup(self.folder.cleanup)
        root = pathlib.Path(self.folder.name)
        (root / "model").mkdir()
        self.model, self.data = tiny_chat_model(root / "model"), root / "data"
        self.data.mkdir(mode=0o700)

    def daemon(self, **settings):
        return Daemon(model=self.model, data=self.data, settings={"learn.enabled": "false", **settings})

    def test_a_killed_helper_comes_back(self):
        with self.daemon() as dsd:
            rules = [f["rule"] for f in dsd.post("/ds/v1/tools/cppcheck", CODE)["findings"]]
            self.assertIn("arrayIndexOutOfBounds", rules)
            before = dsd.get("/ds/v1/plugins/cppcheck")
            self.assertEqual(before["runs_in"], "process")
            self.assertNotEqual(before["pid"], dsd.process.pid)
            os.kill(before["pid"], signal.SIGKILL)
            with self.assertRaises(Exception):
                dsd.post("/ds/v1/tools/cppcheck", CODE)
            again = [f["rule"] for f in dsd.post("/ds/v1/tools/cppcheck", CODE)["findings"]]
            self.assertEqual(again, rules)
            after = dsd.get("/ds/v1/plugins/cppcheck")
            self.assertNotEqual(after["pid"], before["pid"])
            self.assertEqual((after["deaths"], after["breaker"]), (1, "closed"))
            self.assertIn("tool/cppcheck: its helper process ended: signal 9", dsd.log_text())
            self.assertIsNone(dsd.process.poll())
        until = time.monotonic() + 10  # it ends when it sees that the daemon has
        while running(after["pid"]) and time.monotonic() < until:
            time.sleep(0.01)
        self.assertFalse(running(after["pid"]))

    def test_a_tool_runs_in_the_daemon_when_told(self):
        with self.daemon(**{"plugins.isolation": json.dumps({"cppcheck": "daemon"})}) as dsd:
            self.assertTrue(dsd.post("/ds/v1/tools/cppcheck", CODE)["findings"])
            self.assertEqual(dsd.get("/ds/v1/plugins/cppcheck")["runs_in"], "daemon")


if __name__ == "__main__":
    unittest.main()
