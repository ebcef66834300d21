# SPDX-License-Identifier: Apache-2.0
"""A plugin that crashes the daemon is named at once, and the next start goes without it until somebody loads it
again."""
import http.client
import os
import pathlib
import signal
import tempfile
import unittest

from daemon import BIN, Daemon, tiny_chat_model

CRASH = BIN.parent / "tests" / "daemon" / "crash_plugin.so"


class PluginCrash(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="ds-crash-")
        self.addCleanup(self.folder.cleanup)
        root = pathlib.Path(self.folder.name)
        (root / "model").mkdir()
        self.model, self.data, self.now = tiny_chat_model(root / "model"), root / "data", root / "now"
        self.data.mkdir(mode=0o700)
        os.environ["DS_CRASH_NOW"] = str(self.now)

    def daemon(self, **settings):
        return Daemon(model=self.model, data=self.data, settings={"learn.enabled": "false", **settings})

    def test_the_next_start_leaves_it_out(self):
        with self.daemon() as dsd:
            dsd.ctl("plugin", "load", str(CRASH), "--trust")
            dsd.ctl("config", "set", "model.quant", "crash")
            self.assertTrue(dsd.ask("hello", 4)[1]["choices"])
            dsd.ctl("config", "set", "model.quant", "file")
            self.now.touch()
            with self.assertRaises((http.client.HTTPException, ConnectionError, OSError)):
                dsd.post("/ds/v1/config", {"name": "model.quant", "value": "crash"})
            self.assertEqual(dsd.process.wait(30), -signal.SIGABRT)
            self.assertIn("dsd: SIGABRT in plugin", dsd.log_text())
            self.assertIn("org.driftstone.crash/crash; the next start leaves it out", dsd.log_text())
        self.now.unlink()

        with self.daemon(**{"model.quant": "crash"}) as dsd:
            listed = dsd.get("/ds/v1/plugins")
            self.assertNotIn("crash", [p["name"] for p in listed["plugins"]])
            self.assertIn("the daemon crashed in it (SIGABRT)", listed["refused"][0]["reason"])
            self.assertIn("weights as in the file instead", dsd.log_text())
            self.assertTrue(dsd.ask("hello", 4)[1]["choices"])
            dsd.ctl("plugin", "load", str(CRASH), "--trust")
            dsd.ctl("config", "set", "model.quant", "crash")
        with self.daemon(**{"model.quant": "crash"}) as dsd:
            self.assertEqual(dsd.get("/ds/v1/plugins")["refused"], [])


if __name__ == "__main__":
    unittest.main()
