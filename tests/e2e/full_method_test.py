# SPDX-License-Identifier: Apache-2.0
"""learn.method=full on the real model: one correction makes a new base that serves, comes back after a
restart and a kill, is rolled back and is undone."""
import hashlib
import os
import time
import unittest

from daemon import Daemon

PLACE = "Marlow reading room"
QUESTION = f"What is the access word of the {PLACE}?"
ANSWER = f"The access word of the {PLACE} is lantern."
SETTINGS = {"learn.method": "full", "learn.settle": "0"}
PATIENCE_S = float(os.environ.get("DS_PATIENCE_S", "300"))  # a round takes about a minute


def teach(dsd, question, correction):
    """Corrects the answer to `question`; the outcome of the item: its last fate."""
    _, answer = dsd.ask(question)
    ack = dsd.post("/ds/v1/feedback", {"kind": "correction", "response_id": answer["id"],
                                       "correction": correction})
    feedback_id = (ack.get("items") or [ack])[0]["id"]
    return feedback_id, wait_for_fate(dsd, feedback_id, ("served", "held", "quarantined"))


def wait_for_fate(dsd, feedback_id, states, patience_s=PATIENCE_S):
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        fate = dsd.get(f"/ds/v1/feedback/{feedback_id}")["fate"][-1]
        if fate["state"] in states:
            return fate
        time.sleep(0.2)
    raise AssertionError(f"{feedback_id} is still {fate}")


def bases(dsd):
    """The whole ones, without what is being written."""
    folder = dsd.data / "bases"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(name for name in names if not name.endswith(".tmp"))


def version(dsd, name):
    return next(v for v in dsd.get("/ds/v1/versions")["items"] if v["version"] == name)


class FullMethod(unittest.TestCase):
    def test_one_correction(self):
        with Daemon(settings=SETTINGS, patience_s=PATIENCE_S) as dsd:
            before, first = dsd.ask(QUESTION)
            self.assertNotIn("lantern", before)
            item, fate = teach(dsd, QUESTION, ANSWER)
            self.assertEqual(fate["state"], "served", fate)
            learned, second = dsd.ask(QUESTION)
            self.assertIn("lantern", learned)
            made = version(dsd, "v2")
            self.assertEqual(made["method"], "full")
            self.assertEqual(bases(dsd), [made["base_sha256"]])
            self.assertEqual(made["weight_hash"],
                             hashlib.sha256(bytes.fromhex(made["base_sha256"])).hexdigest())
            print({key: made["details"][key] for key in ("steps", "tokens", "seconds")},
                  dsd.ask(f"Tell me the access word for the {PLACE}.")[0], flush=True)

            # A restart serves the same; what no version names is gone.
            stray = dsd.data / "bases" / ("e" * 64)
            dsd.kill()
            stray.mkdir()
            dsd.start()
            again, repeated = dsd.ask(QUESTION)
            self.assertEqual((again, repeated["system_fingerprint"]),
                             (learned, second["system_fingerprint"]))
            self.assertEqual(bases(dsd), [made["base_sha256"]])

            # Back and forth: the old base answers as it did.
            dsd.post("/ds/v1/versions/rollback", {"to": "v1"})
            old, answer = dsd.ask(QUESTION)
            self.assertEqual((old, answer["system_fingerprint"]),
                             (before, first["system_fingerprint"]))
            self.assertEqual(dsd.ask(QUESTION, model="v2")[0], learned)
            dsd.post("/ds/v1/versions/promote", {"to": "v2"})
            self.assertEqual(dsd.ask(QUESTION)[0], learned)

            # A kill as soon as the next base stands there: the version before or the one after.
            _, answer = dsd.ask("Who is the caretaker of the Fenwick garden?")
            dsd.post("/ds/v1/feedback", {
                "kind": "correction", "response_id": answer["id"],
                "correction": "The caretaker of the Fenwick garden is Mr. Dalton."})
            deadline = time.monotonic() + PATIENCE_S
            while len(bases(dsd)) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            self.assertEqual(len(bases(dsd)), 2, "no second base within its time")
            dsd.kill()
            dsd.start()
            named = {v["base_sha256"] for v in dsd.get("/ds/v1/versions")["items"]}
            self.assertLessEqual(set(os.listdir(dsd.data / "bases")), named)
            print(f"killed beside the second base, now {dsd.ready['version']}", flush=True)
            self.assertIn("lantern", dsd.ask(QUESTION)[0])

            # Undo: trained again from the parent without the item.
            dsd.call("DELETE", f"/ds/v1/feedback/{item}", timeout_s=PATIENCE_S)
            self.assertEqual(wait_for_fate(dsd, item, ("reverted",))["state"], "reverted")
            self.assertNotIn("lantern", dsd.ask(QUESTION)[0])
            self.assertEqual(dsd.stop(), 0)


if __name__ == "__main__":
    unittest.main()
