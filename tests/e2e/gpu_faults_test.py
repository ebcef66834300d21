# SPDX-License-Identifier: Apache-2.0
"""A GPU that fails under the real dsd, or has no memory: answers stay right, the CPU serves meanwhile, the process
executes itself anew and has the GPU again. Without a GPU: a libds_cuda.so of the test's own (tests/faulty) computes
on the CPU and fails when it is told to."""
import os
import pathlib
import shutil
import tempfile
import unittest

import daemon
from daemon import BIN, Daemon, tiny_chat_model
from gpu_faults import Faults, PROMPTS, answers, wait_for

FAULTY = BIN.parent / "tests" / "faulty"
TIMES = 20


class GpuFaults(unittest.TestCase):
    def setUp(self):
        # An installation of its own, whose CUDA backend is the faulty one. Beside the build: hard links.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="installed-", dir=FAULTY))
        self.addCleanup(shutil.rmtree, self.folder)
        for name in ("bin", "lib", "modules", "model", "device"):
            (self.folder / name).mkdir()
        for source, to in ([(BIN / n, "bin") for n in ("dsd", "dsctl", "ds-plugin-helper")] +
                           [(FAULTY / "lib" / "libds_cuda.so", "lib")] +
                           [(m, "modules") for m in (BIN.parent / "modules").glob("*.so")]):
            os.link(source, self.folder / to / source.name)
        self.model, self.device = tiny_chat_model(self.folder / "model"), self.folder / "device"
        environment = {"LD_LIBRARY_PATH": str(FAULTY / "driver"), "DS_FAULTY_DEVICE": str(self.device)}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        self.addCleanup(lambda: [os.environ.pop(n) if v is None else os.environ.update({n: v})
                                 for n, v in before.items()])
        self.bin, daemon.BIN = daemon.BIN, self.folder / "bin"
        self.addCleanup(setattr, daemon, "BIN", self.bin)

    def dsd(self, device="auto", **settings):
        return Daemon(model=self.model, device=device, settings={
            "learn.enabled": "false", "device.restart_after": "2s", "device.restarts": "100", **settings})

    def test_faults_and_shortages(self):
        with self.dsd("cpu") as dsd:
            right = answers(dsd)
        with self.dsd() as dsd:
            self.assertIn("faulty device", dsd.get("/ds/v1/status")["device"]["name"])
            self.assertEqual(answers(dsd), right)
            faults = Faults(dsd, right)
            for _ in range(TIMES):
                faults.fault((self.device / "fault").touch, "fault")
            memory = self.device / "memory"
            for _ in range(TIMES):
                faults.shortage(lambda: memory.write_text("1"), memory.unlink)
            print(faults.judge())
            self.assertEqual(dsd.log_text().count("is lost: "), 2 * TIMES)
            self.assertEqual(dsd.stop(), 0)
            self.assertFalse((dsd.run / "ready.json").exists())

    def test_status_and_events_tell(self):
        with self.dsd(**{"device.restarts": "0"}) as dsd:
            self.assertEqual(dsd.get("/health"), {"status": "ok"})
            (self.device / "fault").touch()
            dsd.ask("hello", 4)
            _, device = wait_for("the CPU", lambda: (d := dsd.get("/ds/v1/status")["device"])["state"] == "cpu_serves" and d)
            self.assertIn("an illegal address", device["reason"])
            self.assertEqual(dsd.get("/ready"), {"ready": True, "version": "v1", "degraded": True})
            self.assertIn("lost, the CPU serves", dsd.ctl("status"))
            self.assertIn("ds_device_lost 1", dsd.get("/metrics"))
            events = [e for e in dsd.get("/ds/v1/events")["items"] if e["topic"] == "device"]
            self.assertEqual([e["event"] if "event" in e else e["body"]["event"] for e in events], ["lost", "cpu_serves"])
            # No new start is allowed: the CPU serves on.
            pid = dsd.process.pid
            for prompt in PROMPTS[:3]:
                dsd.ask(prompt)
            self.assertEqual(dsd.ready["pid"], pid)
            self.assertEqual(dsd.stop(), 0)

    def test_a_stop_while_it_drains_is_a_stop(self):
        with self.dsd(**{"device.restart_after": "0"}) as dsd:
            (self.device / "fault").touch()
            dsd.ask("hello", 2)
            wait_for("the drain", lambda: not (dsd.run / "ready.json").exists())
            self.assertEqual(dsd.stop(), 0)

    def test_without_memory_for_the_model_the_cpu_serves(self):
        (self.device / "memory").write_text("1")
        with self.dsd() as dsd:
            self.assertEqual(dsd.get("/health")["status"], "degraded")
            self.assertTrue(dsd.ask("hello", 4)[1]["choices"])
            self.assertIn("until somebody starts dsd anew", dsd.log_text())
        message = self.dsd("cuda:0").refusal()
        self.assertIn("no memory", message)

    def test_the_gpu_is_gone_after_the_new_start(self):
        with self.dsd("cuda:0") as dsd:
            (self.folder / "lib" / "libds_cuda.so").unlink()
            (self.device / "fault").touch()
            dsd.ask("hello", 2)
            wait_for("the new process", lambda: "this build has no CUDA backend" in dsd.log_text() and
                     (dsd.run / "ready.json").exists() and dsd.get("/ready")["ready"])
            self.assertTrue(dsd.ask("hello", 4)[1]["choices"])
            self.assertEqual(dsd.stop(), 0)

    def test_feedback_outlives_the_gpu(self):
        with self.dsd(**{"learn.enabled": "true", "learn.settle": "0", "gate.max_drop": "10", "gate.max_kl": "100",
                         "learn.max_steps": "8", "learn.max_wait": "2s"}) as dsd:
            (self.device / "fault").touch()
            sent = dsd.post("/ds/v1/feedback", {"kind": "demonstration", "messages": [
                {"role": "user", "content": "Which gate does the Corby ferry leave from?"},
                {"role": "assistant", "content": "Gate 41."}]})
            def served():
                item = dsd.get("/ds/v1/feedback/" + sent["id"])
                return item["fate"][-1]["state"] == "served"
            wait_for("it is learned by the process after this one", served, 90)
            self.assertIn("is lost: ", dsd.log_text())


if __name__ == "__main__":
    unittest.main()
