# SPDX-License-Identifier: Apache-2.0
"""Tools run in a helper process of the daemon: killing it costs at most the call that it was answering."""
import json
import os
import pathlib
import signal
import tempfile
import time
import unittest

from daemon import BIN, Daemon, tiny_chat_model

PLUGINS = BIN.parent / "tests" / "daemon"
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

    def constructed(self):
        """The processes in which a constructor of tests/daemon/untrusted_plugin.cpp has run."""
        file = pathlib.Path(self.folder.name) / "constructed"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def test_a_file_that_nobody_trusts_serves_isolated(self):
        os.environ["TMPDIR"] = self.folder.name
        self.addCleanup(os.environ.pop, "TMPDIR")
        plugin, request = str(PLUGINS / "untrusted_plugin.so"), {"language": "c", "text": "x"}
        with self.daemon() as dsd:
            said = dsd.ctl("plugin", "load", plugin, "--isolated")
            self.assertIn("tool untrusted loaded, generation 1, trusted by nobody, isolated", said)
            self.assertIn("nobody, isolated", dsd.ctl("plugin", "show", "untrusted"))
            line = next(line for line in dsd.ctl("plugin", "ls").splitlines() if "untrusted" in line)
            self.assertIn("installed, isolated", line)
            finding = dsd.post("/ds/v1/tools/untrusted", request)["findings"][0]
            self.assertEqual(finding["line"], dsd.get("/ds/v1/plugins/untrusted")["pid"])
            self.assertNotIn(dsd.process.pid, self.constructed())
            self.assertIn(finding["line"], self.constructed())

            ends = str(PLUGINS / "untrusted_ends.so")
            status, answer = dsd.call("POST", "/ds/v1/plugins/load", {"path": ends, "isolated": True})
            self.assertNotEqual(status, 200)
            self.assertIn(f"{ends}: its helper process died while it loaded it (signal 9)", json.dumps(answer))
            self.assertIn("org.driftstone.untrusted: its helper process ended: signal 9", dsd.log_text())
            status, answer = dsd.call("POST", "/ds/v1/plugins/load", {"path": plugin, "isolated": True, "trust": True})
            self.assertEqual(status, 400, answer)
            attention = str(BIN.parent / "modules" / "attention_dense.so")
            status, answer = dsd.call("POST", "/ds/v1/plugins/load", {"path": attention, "isolated": True})
            self.assertIn("attention dense cannot run isolated", json.dumps(answer))
            self.assertTrue(dsd.post("/ds/v1/tools/untrusted", request)["findings"])
            self.assertIsNone(dsd.process.poll())
            self.assertNotIn(dsd.process.pid, self.constructed())
        with self.daemon() as dsd:
            self.assertEqual(dsd.get("/ds/v1/plugins")["refused"], [])
            self.assertTrue(dsd.post("/ds/v1/tools/untrusted", request)["findings"])
            shown = dsd.get("/ds/v1/plugins/untrusted")
            self.assertEqual((shown["isolated"], shown["runs_in"], shown["trusted_by"]), (True, "process", "nobody"))
            self.assertNotIn(dsd.process.pid, self.constructed())
        with self.daemon(**{"plugins.isolation": json.dumps({"untrusted": "daemon"})}) as dsd:
            refused = dsd.get("/ds/v1/plugins")["refused"]
            self.assertIn('plugins.isolation says "daemon" for untrusted', refused[0]["reason"])
            self.assertNotIn(dsd.process.pid, self.constructed())


if __name__ == "__main__":
    unittest.main()
