# SPDX-License-Identifier: Apache-2.0
"""The client of examples/clients against a peer that keeps the rules of the data socket in twenty lines
and misbehaves in every way that a real one may: lost messages, busy, restarts, refused records."""
import json
import os
import random
import tempfile
import threading
import unittest

from daemon import need

zmq = need("zmq")
from feedback import FeedbackClient, FeedbackError  # noqa: E402


class Peer(threading.Thread):
    """Stores (client, epoch, seq) in order. `trouble` is the chance of each kind of trouble."""

    def __init__(self, address, chance, trouble):
        super().__init__(daemon=True)
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.bind(address)
        self.chance, self.trouble, self.stored, self.greeted = chance, trouble, [], set()
        self.over = threading.Event()

    def run(self):
        while not self.over.is_set():
            if self.socket.poll(20):
                peer, raw = self.socket.recv_multipart()
                reply = self.reply(peer, json.loads(raw))
                if reply and self.chance.random() >= self.trouble:  # else it is lost
                    self.socket.send_multipart([peer, json.dumps(reply).encode()])
        self.socket.close(linger=0)

    def reply(self, peer, message):
        if self.chance.random() < self.trouble / 4:
            self.greeted.clear()  # restarted
        if message["op"] == "hello":
            self.greeted.add(peer)
            return {"op": "hello", "store": "s", "last_seq": len(self.stored), "version": "v1"}
        seq, text = message["seq"], message["record"]["text"]
        error = {"op": "error", "seq": seq, "message": ""}
        if peer not in self.greeted:
            return {**error, "code": "no_hello"}
        if seq <= len(self.stored):
            same = self.stored[seq - 1] == text
            ack = {"op": "ack", "seq": seq, "offset": seq, "id": f"fb_{seq}", "duplicate": True}
            return ack if same else {**error, "code": "seq_conflict"}
        if seq > len(self.stored) + 1:
            return {**error, "code": "seq_gap", "expected": len(self.stored) + 1}
        if self.chance.random() < self.trouble:
            return {**error, "code": self.chance.choice(["busy", "storage_full"]), "retry_after_ms": 5}
        if "bad" in text:
            return {**error, "code": "invalid"}
        self.stored.append(text)
        return {"op": "ack", "seq": seq, "offset": seq, "id": f"fb_{seq}", "duplicate": False}


class FeedbackClientTest(unittest.TestCase):
    def run_with(self, trouble, texts, window):
        seed = int(os.environ.get("DS_SEED") or int.from_bytes(os.urandom(4), "little"))
        print(f"DS_SEED={seed}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            peer = Peer(f"ipc://{folder}/s", random.Random(seed), trouble)
            peer.start()
            refused = 0
            with FeedbackClient(f"ipc://{folder}/s", "c", silence_s=0.1) as client:
                waiting = list(texts)
                while waiting or client.outbox:
                    while waiting and len(client.outbox) < window:
                        client.post({"kind": "text", "text": waiting.pop(0)})
                    try:
                        client.poll()
                    except FeedbackError as problem:
                        self.assertEqual(problem.code, "invalid")
                        refused += 1
            peer.over.set()
            peer.join()
            return peer.stored, refused

    def test_each_record_is_stored_once_and_in_order(self):
        texts = [f"text {i}" for i in range(300)]
        for trouble in (0, 0.03, 0.2):
            with self.subTest(trouble):
                self.assertEqual(self.run_with(trouble, texts, window=16), (texts, 0))

    def test_refused_records_leave_no_hole(self):
        texts = [f"bad {i}" if i % 7 == 3 else f"text {i}" for i in range(200)]
        good = [text for text in texts if "bad" not in text]
        for trouble in (0, 0.05):
            with self.subTest(trouble):
                self.assertEqual(self.run_with(trouble, texts, window=8), (good, len(texts) - len(good)))

    def test_one_at_a_time(self):
        with tempfile.TemporaryDirectory() as folder:
            peer = Peer(f"ipc://{folder}/s", random.Random(1), 0)
            peer.start()
            with FeedbackClient(f"ipc://{folder}/s", "c", silence_s=0.2) as client:
                self.assertEqual(client.send({"kind": "text", "text": "a"})["offset"], 1)
                with self.assertRaises(FeedbackError):
                    client.send({"kind": "text", "text": "bad"})
                self.assertEqual(client.send({"kind": "text", "text": "b"})["offset"], 2)
            peer.over.set()
            peer.join()


if __name__ == "__main__":
    unittest.main()
