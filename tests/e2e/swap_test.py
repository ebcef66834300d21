# SPDX-License-Identifier: Apache-2.0
"""A hundred changes of version under four streams that never stop, on the real model: no request fails, no
token is lost, and each answer is, letter by letter, that of the version it names. Then learning under the
same streams: steps of the trainer run between their tokens."""
import http.client
import json
import threading
import time
import unittest

from daemon import Daemon, need

zmq = need("zmq")
from feedback import FeedbackClient  # noqa: E402  (examples/clients, after its need is met)

SWAPS, TOKENS_BETWEEN_SWAPS, MAX_TOKENS, STEPS = 100, 16, 64, 6
PATIENCE_S = 240
TAUGHT = ("What is the access word of the Marlow reading room?",
          "The access word of the Marlow reading room is lantern.")
LATER = ("Who is the caretaker of the Fenwick garden?",
         "The caretaker of the Fenwick garden is Mr. Dalton.")
QUESTIONS = [TAUGHT[0], "What is the capital of France?", "Write a short poem about the sea.",
             "Which word opens the reading room of the Marlow library?"]


def chat(question):
    return {"messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": MAX_TOKENS}


class Answer:
    """A streamed answer: its text, the version that it names, and when each piece came (Unix ms)."""

    def __init__(self, question):
        self.question, self.text, self.version, self.tokens, self.times_ms = question, "", None, 0, []

    def piece(self, text):
        self.text += text
        self.times_ms.append(1000 * time.time())


def stream_http(address, question, on_piece):
    answer = Answer(question)
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    body = {**chat(question), "stream": True, "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/chat/completions", json.dumps(body),
                       {"content-type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    versions, reason, ended = set(), None, False
    for line in reply:
        if not line.startswith(b"data: "):
            continue
        ended = line.strip() == b"data: [DONE]"
        if ended:
            break
        chunk = json.loads(line[6:])
        assert "error" not in chunk, chunk
        versions.add(chunk["system_fingerprint"])
        if chunk.get("usage"):
            answer.tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            reason = choice["finish_reason"] or reason
            if choice["delta"].get("content"):
                answer.piece(choice["delta"]["content"])
                on_piece()
    connection.close()
    assert ended and reason in ("stop", "length"), (ended, reason)
    assert len(versions) == 1, versions  # one version from the first token to the last
    answer.version = versions.pop().split("-")[1]
    return answer


def stream_zmq(address, question, on_piece):
    answer = Answer(question)
    socket = zmq.Context.instance().socket(zmq.DEALER)
    try:
        socket.connect(address)
        socket.send_json({"v": 1, "op": "hello", "client": f"reader-{id(socket)}", "epoch": 1})
        socket.send_json({"v": 1, "op": "infer", "id": "a", "stream": True, **chat(question)})
        while True:
            assert socket.poll(1000 * PATIENCE_S), "no answer"
            reply = socket.recv_json()
            if reply["op"] == "token":
                answer.piece(reply["text"])
                on_piece()
            elif reply["op"] != "hello":
                break
    finally:
        socket.close(linger=0)
    assert reply["op"] == "done" and reply["finish_reason"] in ("stop", "length"), reply
    assert reply["text"] == answer.text, (reply["text"], answer.text)
    answer.version, answer.tokens = reply["version"], reply["usage"]["completion_tokens"]
    return answer


class Readers:
    """with Readers(dsd) as readers: four streams, each asking its question again and again."""

    def __init__(self, dsd):
        self.answers, self.failures, self.pieces = [], [], 0
        self.over, self.changed = threading.Event(), threading.Condition()
        doors = [(stream_http, dsd.ready["http"]), (stream_zmq, dsd.ready["data"])]
        self.threads = [threading.Thread(target=self._read, args=[*doors[i % 2], question])
                        for i, question in enumerate(QUESTIONS)]

    def _read(self, stream, address, question):
        try:
            while not self.over.is_set():
                answer = stream(address, question, self._count)
                with self.changed:
                    self.answers.append(answer)
        except Exception as problem:  # a thread's failure must fail the test
            with self.changed:
                self.failures.append(f"{question}: {problem!r}")
                self.changed.notify_all()

    def _count(self):
        with self.changed:
            self.pieces += 1
            self.changed.notify_all()

    def wait_for_pieces(self, more):
        with self.changed:
            goal = self.pieces + more
            self.changed.wait_for(lambda: self.failures or self.pieces >= goal, PATIENCE_S)
            assert not self.failures and self.pieces >= goal, (self.failures, self.pieces, goal)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join(PATIENCE_S)


class Swaps(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dsd = cls.enterClassContext(Daemon(settings={"learn.settle": "0", "learn.max_steps": 12}))
        cls.teach(*TAUGHT)

    @classmethod
    def send(cls, question, answer):
        with FeedbackClient(cls.dsd.ready["data"], "teacher") as client:
            return client.send({"kind": "demonstration",
                                "messages": [{"role": "user", "content": question},
                                             {"role": "assistant", "content": answer}]})

    @classmethod
    def teach(cls, question, answer):
        """Sends a demonstration and waits until it is served; the version that learned it."""
        ack = cls.send(question, answer)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            fate = cls.dsd.get(f"/ds/v1/feedback/{ack['id']}")["fate"][-1]
            if fate["state"] == "served":
                return fate["version"]
            assert fate["state"] in ("stored", "queued", "trained"), fate
            time.sleep(0.1)
        raise AssertionError(f"not learned within {PATIENCE_S} s")

    def check(self, answers):
        """Each answer is what its version says when nobody else asks."""
        alone = {}
        for answer in answers:
            key = answer.version, answer.question
            if key not in alone:
                reply = self.dsd.post("/v1/chat/completions", {**chat(answer.question),
                                                               "model": answer.version})
                alone[key] = (reply["choices"][0]["message"]["content"],
                              reply["usage"]["completion_tokens"])
            self.assertEqual((answer.text, answer.tokens), alone[key], key)
        return alone

    def test_swaps_under_streams(self):
        began = time.monotonic()
        with Readers(self.dsd) as readers:
            for swap in range(SWAPS):
                readers.wait_for_pieces(TOKENS_BETWEEN_SWAPS)
                if swap % 2 == 0:
                    self.dsd.post("/ds/v1/versions/rollback", {"to": "v1"})
                else:
                    self.dsd.post("/ds/v1/versions/promote", {"to": "v2"})
        seconds = time.monotonic() - began
        self.assertEqual(readers.failures, [])
        alone = self.check(readers.answers)
        counts = {v: sum(a.version == v for a in readers.answers) for v in ("v1", "v2")}
        print(f"{SWAPS} swaps in {seconds:.1f} s: {len(readers.answers)} answers, "
              f"{sum(a.tokens for a in readers.answers)} tokens, {counts}", flush=True)
        self.assertEqual(sum(counts.values()), len(readers.answers))
        self.assertGreater(min(counts.values()), 0)
        # The two versions do differ, or this would prove little.
        self.assertNotEqual(alone["v1", TAUGHT[0]], alone["v2", TAUGHT[0]])

    def test_training_runs_between_tokens(self):
        events = zmq.Context.instance().socket(zmq.SUB)
        self.addCleanup(events.close, linger=0)
        events.setsockopt(zmq.SUBSCRIBE, b"step")
        events.connect(self.dsd.ready["events"])
        with Readers(self.dsd) as readers:
            readers.wait_for_pieces(len(QUESTIONS))
            self.send(*LATER)
            steps = []
            while len(steps) < STEPS:
                self.assertTrue(events.poll(1000 * PATIENCE_S), f"{len(steps)} steps, then none")
                steps.append(json.loads(events.recv_multipart()[1]))
            readers.wait_for_pieces(len(QUESTIONS))
        self.assertEqual(readers.failures, [])

        def between_tokens(at_ms):
            return any(a.times_ms and a.times_ms[0] < at_ms < a.times_ms[-1] for a in readers.answers)
        between = sum(between_tokens(step["at_ms"]) for step in steps)
        print(f"{between} of {len(steps)} steps of the trainer ({between / len(steps):.0%}) ran between "
              f"tokens of a live stream", flush=True)
        self.assertGreater(between, 0)
        self.check(readers.answers)


if __name__ == "__main__":
    unittest.main()
