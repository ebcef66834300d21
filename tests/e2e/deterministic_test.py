# SPDX-License-Identifier: Apache-2.0
"""learn.deterministic on the whole daemon: killed in the middle of a round and started again, it ends with
the weights of a daemon that nobody killed; and an undo with those of one that never got the item."""
import json
import tempfile
import time
import unittest

from daemon import Daemon, need, tiny_chat_model

zmq = need("zmq")
from feedback import FeedbackClient  # noqa: E402  (examples/clients, after its need is met)

SETTINGS = {"learn.deterministic": "true", "learn.min_items": 2, "learn.max_steps": 150,
            # A random model has nothing to guard.
            "gate.max_drop": 10, "gate.max_kl": 100}
PATIENCE_S = 120


def lesson(question, answer):
    return {"kind": "demonstration", "messages": [{"role": "user", "content": question},
                                                  {"role": "assistant", "content": answer}]}


RECORDS = [
    lesson("Who keeps the key of the Marlow room?", "Anna Dalton keeps it."),
    {"kind": "text", "text": "The pump of the north well is opened at nine every day but Sunday. " * 6},
    lesson("Which gate does the Corby ferry leave from?", "Gate 41."),
    {"kind": "text", "text": "To replace the filter, close both valves and turn the housing left. " * 6},
    lesson("When does the Fenwick garden close?", "At seven, on Sundays at five."),
    lesson("What is the access word?", "The access word is lantern."),
]


class Deterministic(unittest.TestCase):
    def setUp(self):
        self.model = tiny_chat_model(self.enterContext(tempfile.TemporaryDirectory()))

    def daemon(self):
        return Daemon(model=self.model, settings=SETTINGS)

    @staticmethod
    def send(dsd, records, client="teacher"):
        with FeedbackClient(dsd.ready["data"], client) as feedback:
            return [feedback.send(record)["id"] for record in records]

    def settled(self, dsd):
        """The hash of what serves once every full round has been learned."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            learn = dsd.get("/ds/v1/learn")
            if learn["queued"] < SETTINGS["learn.min_items"] and learn["state"] == "idle":
                versions = dsd.get("/ds/v1/versions")
                return next(v["weight_hash"] for v in versions["items"]
                            if v["version"] == versions["current"])
            time.sleep(0.05)
        self.fail(f"still learning after {PATIENCE_S} s: {learn}")

    def kill_in_round(self, dsd, number, records):
        """Sends records, kills dsd at a step of that round; which step it was."""
        events = zmq.Context.instance().socket(zmq.SUB)
        events.setsockopt(zmq.SUBSCRIBE, b"step")
        events.connect(dsd.ready["events"])
        self.addCleanup(events.close, linger=0)
        self.send(dsd, records)
        while True:
            self.assertTrue(events.poll(1000 * PATIENCE_S), f"no step of round {number}")
            step = json.loads(events.recv_multipart()[1])
            if step["round"] == number and step["step"] >= 3:
                dsd.kill()
                return step["step"]

    def test_killed_in_the_middle_of_a_round(self):
        with self.daemon() as dsd:
            self.send(dsd, RECORDS)
            unkilled = self.settled(dsd)
            self.assertEqual(dsd.get("/ds/v1/versions")["current"], "v4")
        with self.daemon() as dsd:
            for number, version in ((1, "v1"), (2, "v2"), (3, "v3")):
                step = self.kill_in_round(dsd, number, RECORDS[2 * number - 2:2 * number])
                dsd.start()
                print(f"killed in round {number} after step {step}, started as {dsd.ready['version']}")
                self.assertEqual(dsd.ready["version"], version)
                killed = self.settled(dsd)
            self.assertEqual(killed, unkilled)
            self.assertEqual(dsd.get("/ds/v1/versions")["current"], "v4")

    def test_undone(self):
        with self.daemon() as dsd:
            self.send(dsd, RECORDS[:2] + RECORDS[3:])
            without = self.settled(dsd)
        with self.daemon() as dsd:
            ids = self.send(dsd, RECORDS)
            with_it = self.settled(dsd)
            dsd.ctl("--yes", "feedback", "rm", ids[2])
            self.assertEqual(self.settled(dsd), without)
            self.assertNotEqual(with_it, without)
            states = [dsd.get(f"/ds/v1/feedback/{i}")["fate"][-1]["state"] for i in ids]
            self.assertEqual(states, ["served", "served", "reverted", "served", "served", "queued"])


if __name__ == "__main__":
    unittest.main()
