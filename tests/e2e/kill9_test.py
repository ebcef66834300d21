# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments. An acknowledged record is never lost, never doubled and never changed; an
interrupted round of learning leaves the version before it or the version after it."""
import os
import random
import threading
import time
import unittest

from daemon import Daemon, need

need("zmq")
from feedback import FeedbackClient  # noqa: E402  (examples/clients, after its need is met)

KILLS, CLIENTS, WINDOW = 20, 4, 16


class Kill9(unittest.TestCase):
    def setUp(self):
        seed = int(os.environ.get("DS_SEED") or int.from_bytes(os.urandom(4), "little"))
        print(f"DS_SEED={seed}", flush=True)
        self.chance = random.Random(seed)

    def test_the_ledger_holds(self):
        settings = {"learn.enabled": "false"}
        with Daemon(settings=settings) as dsd:
            stop, ledgers, failures = threading.Event(), [{} for _ in range(CLIENTS)], []

            def pump(number):
                try:
                    keep_sending(f"client-{number}", ledgers[number])
                except Exception as problem:  # a thread's failure must fail the test
                    failures.append(f"client-{number}: {problem!r}")

            def keep_sending(name, ledger):
                with FeedbackClient(dsd.ready["data"], name, silence_s=0.5) as client:
                    while not stop.is_set() or client.outbox:
                        while not stop.is_set() and len(client.outbox) < WINDOW:
                            client.post({"kind": "text", "text": f"{name} says {client.next_seq}"})
                        ack = client.poll()
                        if ack:
                            entry = (ack["offset"], ack["id"])
                            assert ledger.setdefault(ack["seq"], entry) == entry, (ack, entry)
                            time.sleep(0.002)  # some hundred records a second are enough

            threads = [threading.Thread(target=pump, args=[n]) for n in range(CLIENTS)]
            for thread in threads:
                thread.start()
            for _ in range(KILLS):
                time.sleep(self.chance.uniform(0.0, 0.8))
                dsd.kill()
                dsd.start()
            stop.set()
            for thread in threads:
                thread.join(120)
            self.assertEqual(failures, [])
            self.check_store(dsd, ledgers)
            self.assertEqual(dsd.stop(), 0)

    def check_store(self, dsd, ledgers):
        sent = {}
        for number, ledger in enumerate(ledgers):
            self.assertEqual(sorted(ledger), list(range(1, len(ledger) + 1)))
            for seq, (offset, feedback_id) in ledger.items():
                self.assertNotIn(offset, sent)
                sent[offset] = (feedback_id, f"client-{number}", f"client-{number} says {seq}")
        stored, after = {}, 0
        while items := dsd.get(f"/ds/v1/feedback?limit=500&after={after}")["items"]:
            after = max(item["offset"] for item in items)
            stored.update((item["offset"], (item["id"], item["source"])) for item in items)
        self.assertEqual(stored, {offset: (i, source) for offset, (i, source, _) in sent.items()})
        print(f"{len(sent)} records acknowledged over {KILLS} kills, all there once", flush=True)
        for offset in self.chance.sample(sorted(sent), min(50, len(sent))):
            feedback_id, _, text = sent[offset]
            item = dsd.get(f"/ds/v1/feedback/{feedback_id}")
            self.assertEqual((item["record"]["text"], item["offset"]), (text, offset))
        self.assertTrue(dsd.post("/ds/v1/replay/verify", {})["ok"])

    def test_an_interrupted_round_is_all_or_nothing(self):
        with Daemon(settings={"learn.settle": "0"}) as dsd:
            question = "What is the access word of the Marlow reading room?"
            before, answer = dsd.ask(question)
            with FeedbackClient(dsd.ready["data"], "teacher") as client:
                ack = client.send({"kind": "correction", "response_id": answer["id"],
                                   "correction": "The access word of the Marlow reading room is lantern."})
            for _ in range(5):
                time.sleep(self.chance.uniform(0.2, 6.0))
                dsd.kill()
                dsd.start()
                now, answer = dsd.ask(question)
                version = answer["system_fingerprint"].split("-")[1]
                if version == "v1":
                    self.assertEqual(now, before)
                else:
                    self.assertIn("lantern", now)
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline:
                fate = dsd.get(f"/ds/v1/feedback/{ack['id']}")["fate"]
                if fate[-1]["state"] == "served":
                    break
                time.sleep(0.2)
            self.assertEqual(fate[-1]["state"], "served", fate)
            learned, answer = dsd.ask(question)
            self.assertIn("lantern", learned)
            # The version that was learned is the one on disk.
            dsd.kill()
            dsd.start()
            again, repeated = dsd.ask(question)
            self.assertEqual((again, repeated["system_fingerprint"]),
                             (learned, answer["system_fingerprint"]))


if __name__ == "__main__":
    unittest.main()
