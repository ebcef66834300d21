# SPDX-License-Identifier: Apache-2.0
"""A full disk under the whole daemon: feedback is refused by name and never acknowledged, answers go on, and
when there is space again so does everything else, with every acknowledged record there. The data folder is on
a small tmpfs in a mount namespace of the test's own."""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest

from daemon import SKIPPED, Daemon, need, tiny_chat_model

zmq = need("zmq")

DISK_BYTES, LEFT_BYTES, PATIENCE_S = 96 << 20, 48 << 10, 60
INSIDE = "DS_DISK_FULL_INSIDE"


def enter_namespace():
    """Runs this program again where it may mount; says so and skips when the machine does not allow it."""
    probe = ["unshare", "-Urm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    try:
        tried = subprocess.run(probe, capture_output=True, text=True, check=False)
        refused = tried.stderr.strip() if tried.returncode else ""
    except FileNotFoundError as missing:
        refused = str(missing)
    if refused:
        print(f"no mount namespace here: {refused}")
        sys.exit(SKIPPED)
    os.execvpe("unshare", ["unshare", "-Urm", sys.executable, *sys.argv], {**os.environ, INSIDE: "1"})


class Disk:
    """A file system of DISK_BYTES."""

    def __init__(self, folder):
        self.folder, self.ballast = pathlib.Path(folder), pathlib.Path(folder, "ballast")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True)

    def unmount(self):
        subprocess.run(["umount", "-l", self.folder], check=True)

    def fill(self, leave=0):
        with self.ballast.open("ab", buffering=0) as file:
            for block in (1 << 20, 4096):
                try:
                    while True:
                        file.write(bytes(block))
                except OSError:
                    pass
            file.truncate(max(file.tell() - leave, 0))

    def free(self):
        self.ballast.unlink()


class DiskFull(unittest.TestCase):
    def setUp(self):
        self.model = tiny_chat_model(self.enterContext(tempfile.TemporaryDirectory()))
        self.disk = Disk(self.enterContext(tempfile.TemporaryDirectory()))
        self.addCleanup(self.disk.unmount)

    def daemon(self, **settings):
        named = {name.replace("_", ".", 1): value for name, value in settings.items()}
        return Daemon(model=self.model, data=self.disk.folder / "data",
                      settings={"gate.max_drop": 10, "gate.max_kl": 100, "learn.max_steps": 12, **named})

    def connect(self, dsd):
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.addCleanup(self.socket.close, linger=0)
        self.socket.connect(dsd.ready["data"])
        return self.exchange({"op": "hello", "client": "writer", "epoch": 1})

    def exchange(self, message):
        self.socket.send_json({"v": 1, **message})
        self.assertTrue(self.socket.poll(10_000), f"no answer to {str(message)[:200]}")
        return self.socket.recv_json()

    def send(self, seq):
        text = f"record {seq} " + 20_000 * chr(ord("a") + seq % 26)
        return text, self.exchange({"op": "feedback", "client": "writer", "epoch": 1, "seq": seq,
                                    "record": {"kind": "text", "text": text}})

    def ask(self, dsd):
        answer, whole = dsd.ask("Hello?", max_tokens=8)
        self.assertEqual(whole["usage"]["completion_tokens"], 8)
        return answer

    def check_records(self, dsd, acked):
        for seq, (text, ack) in acked.items():
            item = dsd.get(f"/ds/v1/feedback/{ack['id']}")
            self.assertEqual((item["record"]["text"], item["seq"], item["offset"]),
                             (text, seq, ack["offset"]))
        listed = [item["offset"] for item in dsd.get("/ds/v1/feedback?limit=500")["items"]]
        self.assertEqual(sorted(listed), sorted(ack["offset"] for _, ack in acked.values()))
        self.assertTrue(dsd.post("/ds/v1/replay/verify", {})["ok"])

    def test_feedback_is_refused_until_there_is_space(self):
        with self.daemon(learn_enabled="false") as dsd:
            self.connect(dsd)
            before, acked = self.ask(dsd), {}
            for seq in range(1, 4):
                acked[seq] = self.send(seq)
            self.disk.fill()
            while True:  # what the log had reserved is used up first
                seq = len(acked) + 1
                text, reply = self.send(seq)
                if reply["op"] == "error":
                    break
                acked[seq] = text, reply
                self.disk.fill()
            print(f"{len(acked)} records acknowledged, then {json.dumps(reply)}")
            self.assertEqual((reply["code"], reply["seq"]), ("storage_full", seq))
            self.assertIn("No space left on device", reply["message"])
            self.assertIn(str(dsd.data), reply["message"])  # which file
            self.assertGreater(reply["retry_after_ms"], 0)
            # It stays so, over HTTP too, and answers go on.
            for _ in range(3):
                self.assertEqual(self.send(seq)[1]["code"], "storage_full")
                self.assertEqual(self.ask(dsd), before)
            status, answer = dsd.call("POST", "/ds/v1/feedback", {"kind": "text", "text": 9999 * "z"})
            self.assertEqual((status, answer["error"]["code"]), (507, "storage_full"), answer)

            self.disk.free()
            deadline = time.monotonic() + PATIENCE_S
            while (reply := self.send(seq)[1])["op"] == "error":
                self.assertLess(time.monotonic(), deadline, reply)
                self.assertEqual(reply["code"], "storage_full")
                time.sleep(reply["retry_after_ms"] / 1000)
            acked[seq] = text, reply
            for seq in range(seq + 1, seq + 4):
                acked[seq] = self.send(seq)
                self.assertEqual(acked[seq][1]["op"], "ack", acked[seq][1])
            self.check_records(dsd, acked)
            dsd.kill()
            dsd.start()
            self.check_records(dsd, acked)
            self.assertEqual(self.connect(dsd)["last_seq"], seq)
            self.assertEqual(dsd.stop(), 0)

    def test_a_version_that_cannot_be_written_does_not_serve(self):
        with self.daemon(learn_settle="1d", learn_rank=16) as dsd:  # rounds open when the test says
            before = self.ask(dsd)

            def teach(text):
                reply = dsd.post("/ds/v1/feedback", {"kind": "text", "text": text})
                return reply["id"] if "id" in reply else reply["items"][0]["id"]
            feedback_id = teach("The pump of the north well is opened at nine every day but Sunday.")
            self.disk.fill(leave=LEFT_BYTES)  # enough for a word of the log, not for a version
            outcome = dsd.post("/ds/v1/learn/step", {"wait": True})
            print(json.dumps(outcome)[:300])
            self.assertEqual(outcome["outcome"], "held", outcome)
            self.assertIn("No space left on device", outcome["reason"])
            self.assertEqual(dsd.get("/ds/v1/versions")["current"], "v1")
            fate = dsd.get(f"/ds/v1/feedback/{feedback_id}")["fate"][-1]
            self.assertEqual((fate["state"], fate["reason"]), ("queued", outcome["reason"]))
            self.assertEqual(self.ask(dsd), before)
            versions = dsd.data / "models" / "default" / "versions"
            self.assertEqual([folder.name for folder in versions.iterdir()], ["v1"])

            self.disk.free()
            later = teach("Anna Dalton keeps the key of the Marlow room.")
            self.assertEqual(dsd.post("/ds/v1/learn/step", {"wait": True})["version"], "v2")
            for learned in (feedback_id, later):
                self.assertEqual(dsd.get(f"/ds/v1/feedback/{learned}")["fate"][-1]["state"], "served")
            dsd.kill()
            dsd.start()
            self.assertEqual(dsd.ready["version"], "v2")


if __name__ == "__main__":
    if not os.environ.get(INSIDE):
        enter_namespace()
    unittest.main()
