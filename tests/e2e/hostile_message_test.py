# SPDX-License-Identifier: Apache-2.0
"""Messages that no client should send, over ZeroMQ and HTTP: each gets an error that names the field, what was
found and what was expected. Nothing of it is stored, nothing that was stored is lost, others are answered
meanwhile, and memory comes back."""
import contextlib
import json
import pathlib
import socket
import struct
import tempfile
import time
import unittest

from daemon import Daemon, need, tiny_chat_model

zmq = need("zmq")

CONTEXT, MAX_BODY, PATIENCE_S = 256, 1 << 20, 20
HUNDRED_MB, GROWTH = 100_000_000, 24 << 20  # bytes; what may stay after a hundred megabytes came
TOO_LONG = "pump " * 300
INPUT = struct.pack("<4f", 1, 2, 3, 4)  # of the task model, which has four inputs
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FINITE = "expected a finite FP32 number"


class Peer:
    """A client of the data socket, greeted."""

    def __init__(self, dsd, name):
        self.name, self.socket = name, zmq.Context.instance().socket(zmq.DEALER)
        self.socket.connect(dsd.ready["data"])
        self.last_seq = self.hello()

    def close(self):
        self.socket.close(linger=0)

    def send(self, *frames, copy=True):
        self.socket.send_multipart(frames, copy=copy)

    def receive(self):
        if not self.socket.poll(PATIENCE_S * 1000):
            raise AssertionError(f"{self.name}: no answer within {PATIENCE_S} s")
        return json.loads(self.socket.recv_multipart()[-1])

    def exchange(self, *frames):
        self.send(*frames)
        return self.receive()

    def say(self, *attachments, **header):
        return self.exchange(json.dumps({"v": 1, **header}).encode(), *attachments)

    def hello(self):
        return self.say(op="hello", client=self.name, epoch=1)["last_seq"]

    def feedback(self, record, *attachments, seq=None):
        return self.say(*attachments, op="feedback", client=self.name, epoch=1, seq=seq or self.last_seq + 1,
                        record=record)

    def label(self, value, *attachments, **fields):
        return self.feedback({"kind": "label", "model": "digits", "label": 1, "input": value, **fields},
                             *attachments)


class HostileMessages(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        model = tiny_chat_model(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.dsd = cls.enterClassContext(Daemon(model=model, settings={
            "serve.context": CONTEXT, "limits.max_body": MAX_BODY, "learn.settle": "1d"}))
        cls.dsd.ctl("model", "new", "digits", "--mlp", "4,8,3")
        cls.answer = cls.dsd.ask("Hello?", max_tokens=8)[0]
        with contextlib.closing(Peer(cls.dsd, "hostile")) as peer:  # a rating changes no answer
            messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
            cls.known = peer.feedback({"kind": "rating", "rating": 1, "messages": messages})["id"]

    def setUp(self):
        self.peer = Peer(self.dsd, "hostile")
        self.addCleanup(self.peer.close)
        self.stored = self.count()

    def tearDown(self):
        self.assertEqual(self.count(), self.stored)
        self.assertEqual(self.peer.hello(), self.peer.last_seq)
        self.assertEqual(self.dsd.get(f"/ds/v1/feedback/{self.known}")["seq"], 1)
        self.assertEqual(self.dsd.ask("Hello?", max_tokens=8)[0], self.answer)
        done = self.peer.say(op="infer", id="after", prompt="Hello", max_tokens=2)
        self.assertEqual((done["op"], done["id"]), ("done", "after"), done)

    @classmethod
    def tearDownClass(cls):
        """After the whole lot and a kill -9, what was stored is there and nothing else."""
        stored = cls.count()
        cls.dsd.kill()
        cls.dsd.start()
        if (cls.count(), cls.dsd.get(f"/ds/v1/feedback/{cls.known}")["seq"]) != (stored, 1):
            raise AssertionError(f"{stored} items before the kill, {cls.count()} after")
        if not cls.dsd.post("/ds/v1/replay/verify", {})["ok"]:
            raise AssertionError("the store is damaged")

    @classmethod
    def count(cls):
        return sum(cls.dsd.get("/ds/v1/feedback-stats")["state"].values())

    def memory(self):
        """Resident bytes of dsd."""
        pages = pathlib.Path(f"/proc/{self.dsd.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096

    @contextlib.contextmanager
    def memory_comes_back(self):
        before = self.memory()
        yield
        deadline = time.monotonic() + PATIENCE_S
        while (now := self.memory()) > before + GROWTH:
            self.assertLess(time.monotonic(), deadline, f"{before} bytes of memory before, {now} after")
            time.sleep(0.02)

    def expect_error(self, reply, code, *words, **identity):
        self.assertEqual((reply["op"], reply["code"]), ("error", code), reply)
        for word in words:
            self.assertIn(word, reply["message"])
        self.assertLess(len(reply["message"]), 1100)  # however much was sent
        for name, value in identity.items():
            self.assertEqual(reply[name], value, reply)


class OverZeroMq(HostileMessages):
    def test_attachments_that_are_missing(self):
        seq = self.peer.last_seq + 1
        for attachments, index in (((), 0), ((INPUT,), 1), ((INPUT,), -1), ((INPUT,), 1 << 62)):
            words = f'"input.attachment" is {index}, expected the index of one of the {len(attachments)} '
            self.expect_error(self.peer.label({"attachment": index}, *attachments), "bad_record", words, seq=seq)
            self.expect_error(self.peer.say(*attachments, op="infer", id="i", model="digits",
                                            input={"attachment": index}), "bad_message", words, id="i")
        for index, words in ((0.5, '"attachment" is 0.5, expected an integer'),
                             ("0", '"attachment" is string, expected an integer'),
                             (None, '"attachment" is missing, expected an integer')):
            self.expect_error(self.peer.label({"attachment": index}, INPUT), "bad_record", words, seq=seq)
        messages = [{"role": "user", "content": [{"type": "image", "attachment": 0}]},
                    {"role": "assistant", "content": "A well."}]
        self.expect_error(self.peer.feedback({"kind": "demonstration", "messages": messages}), "bad_record",
                          '"messages[0].content[0].attachment" is 0, expected the index of one of the 0')

    def test_attachments_of_another_form(self):
        nan = struct.pack("<4f", 1, 2, float("nan"), 4)
        for value, attachment, *words in (
                ({"attachment": 0}, INPUT[:5], '"input.attachment 0" is 5 bytes, expected FP32 values'),
                ({"attachment": 0}, b"", '"input.attachment 0" is 0 bytes, expected FP32 values'),
                ({"attachment": 0, "dtype": "F16"}, INPUT[:8], '"input.dtype" is "F16", expected "F32"'),
                ({"attachment": 0}, nan, '"input.attachment 0 value 2" is NaN', FINITE),
                ([1, 2, 3, 1e300], b"", '"input[3]" is 1e+300', FINITE),
                ([1, 2, "three", 4], b"", '"input[2]" is "three"', FINITE),
                ([], b"", '"input" is empty, expected an array of numbers or {"attachment": i}')):
            self.expect_error(self.peer.label(value, attachment), "bad_record", *words)
            self.expect_error(self.peer.say(attachment, op="infer", id="i", model="digits", input=value),
                              "bad_message", *words, id="i")
        # As many numbers as another model has: infer says so at once, a label's fate does.
        self.expect_error(self.peer.say(INPUT[:8], op="infer", id="i", model="digits", input={"attachment": 0}),
                          "invalid", "input: 2 numbers, model digits wants 4")

    def test_a_label_of_another_size_is_kept_and_named(self):
        ack = self.peer.label({"attachment": 0}, INPUT[:8])
        self.assertEqual(ack["op"], "ack", ack)
        self.stored, self.peer.last_seq = self.stored + 1, ack["seq"]
        self.dsd.post("/ds/v1/learn/step", {"wait": True})
        deadline = time.monotonic() + PATIENCE_S
        while (fate := self.dsd.get(f"/ds/v1/feedback/{ack['id']}")["fate"][-1])["state"] == "stored":
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.02)
        self.assertEqual((fate["state"], fate["reason"]),
                         ("quarantined", "input: 2 numbers, the model wants 4"))

    def test_attachments_to_spare(self):
        too_many = "attachments: more than 64, which is the limit"
        for count in (65, 200):
            self.expect_error(self.peer.label({"attachment": 0}, *[INPUT] * count), "too_large", too_many,
                              seq=self.peer.last_seq + 1)
        sizes = [9 << 20, 9 << 20]
        self.expect_error(self.peer.label({"attachment": 0}, *map(bytes, sizes)), "too_large",
                          f"attachments: {sum(sizes)} bytes together, the limit is {16 << 20}")
        # Within the limits they are kept, whoever may know what they are for.
        ack = self.peer.label({"attachment": 1}, b"spare", INPUT, b"")
        self.assertEqual(ack["op"], "ack", ack)
        self.stored, self.peer.last_seq = self.stored + 1, ack["seq"]
        self.assertEqual(self.dsd.get(f"/ds/v1/feedback/{ack['id']}")["attachment_bytes"], [5, 16, 0])
        again = self.peer.feedback({"kind": "label", "model": "digits", "label": 1, "input": {"attachment": 1}},
                                   b"spare", INPUT, seq=ack["seq"])
        self.expect_error(again, "seq_conflict", f"seq {ack['seq']} is stored with another payload")

    def test_headers_of_a_hundred_megabytes(self):
        other = Peer(self.dsd, "other")
        self.addCleanup(other.close)
        with self.memory_comes_back():
            for content in (b"x" * HUNDRED_MB, b'{"v":1,"op":"hello","pad":"' + b"x" * HUNDRED_MB + b'"}',
                            b"[" * HUNDRED_MB):
                self.peer.send(content, copy=False)
                self.assertEqual(other.hello(), 0)  # while it is on its way
                self.assertEqual(self.dsd.ask("Hello?", max_tokens=8)[0], self.answer)
                self.expect_error(self.peer.receive(), "too_large", f"the header has {len(content)} bytes",
                                  "the limit is 3211264")
        # Beyond the largest frame at all: the connection ends, and the next one works.
        monitor = self.peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        with self.memory_comes_back():
            self.peer.send(bytes(140 << 20), copy=False)
            self.assertTrue(monitor.poll(PATIENCE_S * 1000), "a frame of 140 MiB is neither answered nor refused")
        self.peer.socket.disable_monitor()
        monitor.close(linger=0)
        self.assertEqual(other.hello(), 0)

    def test_fields_of_infer(self):
        def refused(words, code="bad_message", **fields):
            with self.subTest(words):
                self.expect_error(self.peer.say(op="infer", id="i", **{"prompt": "Hello", **fields}), code, words,
                                  id="i")
        for text, words in (('NaN', '"temperature":N'), ("-Infinity", "last read: '-I'"),
                            ("1e999", "number overflow parsing '1e999', expected a number that FP64 can hold")):
            header = f'{{"v":1,"op":"infer","id":"i","prompt":"Hello","temperature":{text}}}'
            self.expect_error(self.peer.exchange(header.encode()), "bad_message", "JSON", words)
        refused('temperature: expected a number, got "hot"', temperature="hot")
        refused("temperature: -1 is out of range: 0.0 to 2.0", temperature=-1)
        refused("temperature: 2.5 is out of range: 0.0 to 2.0", temperature=2.5)
        refused("max_tokens: -5 is out of range: at least 0", max_tokens=-5)
        refused("max_tokens: expected an integer, got 1.5", max_tokens=1.5)
        refused("max_tokens: expected an integer, got 1.18", max_tokens=1 << 70)
        refused("top_p: 7 is out of range: 0.0 to 1.0", top_p=7)
        refused("stop: 9 strings, expected at most 4", stop=["a"] * 9)
        refused("logit_bias: '640' is not a token id below 640", logit_bias={"640": 1})
        refused('stream: expected true or false, got "yes"', stream="yes")
        refused("class: 'urgent', expected interactive or batch", **{"class": "urgent"})
        refused("expected interactive or batch", **{"class": "u" * 1_000_000})
        refused("prompt: expected a string, got 5", prompt=5)
        refused("messages: expected a non-empty list of {role, content}, got string", messages="Hello")
        refused("messages[0].role: 'robot', expected system, user or assistant",
                messages=[{"role": "robot", "content": "Hello"}])
        refused("messages[0].content: expected a string or a list of parts, got number",
                messages=[{"role": "user", "content": 5}])
        refused("no model gpt-9, expected default, vN or default@vN", code="not_found", model="gpt-9")
        refused("has no version v77, the newest is v1", code="not_found", model="v77")
        refused("expected default, vN or default@vN", code="not_found", model="m" * 1_000_000)
        refused("no task model poems, known: ", code="not_found", model="poems", input=[1])
        self.expect_error(self.peer.say(op="dance", id="i"), "unknown_op",
                          "op: 'dance', expected hello, feedback, infer or cancel", id="i")
        self.expect_error(self.peer.exchange(b'"' + b"a" * 2_000_000), "bad_message", "missing closing quote")

    def test_prompts_beyond_the_context(self):
        for fields in ({"prompt": TOO_LONG}, {"messages": [{"role": "user", "content": TOO_LONG}]}):
            reply = self.peer.say(op="infer", id="i", **fields)
            self.expect_error(reply, "invalid", f"tokens, at most {CONTEXT - 1} fit the context of {CONTEXT}")
            self.assertGreater(int(reply["message"].split()[1]), CONTEXT)  # "prompt: 913 tokens, ..."

    def test_fields_of_feedback(self):
        for record, *words in (
                ({"kind": "poem"}, '"kind" is "poem"', "expected demonstration, correction"),
                ({"kind": "text", "text": 5}, '"text" is number, expected a string'),
                ({"kind": "text", "text": "x" * 1_100_000}, "bytes, the limit is 1048576"),
                ({"kind": "rating", "rating": 3}, '"rating" is 3, expected a number from -1 to 1'),
                ({"kind": "label", "model": "digits", "input": [1, 2, 3, 4], "label": -1},
                 '"label" is -1, expected a class number from 0'),
                ({"kind": "retract", "target": "fb_0"}, '"target" is "fb_0", expected a feedback id'),
                ({"kind": "correction", "correction": "x", "response_id": "none"}, "unknown_response", "none")):
            self.expect_error(self.peer.feedback(record), "bad_record", *words, seq=self.peer.last_seq + 1)
        self.expect_error(self.peer.feedback([]), "bad_message", "record: array, expected an object")
        self.expect_error(self.peer.feedback({"kind": "text", "text": "x"}, seq=99), "seq_gap",
                          f"seq 99, expected {self.peer.last_seq + 1}", expected=self.peer.last_seq + 1)


class OverHttp(HostileMessages):
    def refused(self, path, body, status, words, param=None, method="POST"):
        with self.subTest(words):
            got, answer = self.dsd.call(method, path, body, admin=False)
            self.assertEqual(got, status, answer)
            self.assertIn(words, answer["error"]["message"])
            self.assertLess(len(answer["error"]["message"]), 1100)
            self.assertEqual(answer["error"]["param"], param)

    def pour(self, head, piece, total=HUNDRED_MB):
        """Sends `head` and then `piece` over and over, as far as dsd takes it: the status line."""
        host, port = self.dsd.ready["http"].rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head)
                for _ in range(total // len(piece)):
                    connection.sendall(piece)
            return connection.makefile("rb").readline().decode()

    def test_fields(self):
        def chat(words, status=400, param=None, **fields):
            body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
            self.refused(CHAT, body, status, words, param)
        for text, words in (("NaN", '"temperature":N'),
                            ("1e999", "number overflow parsing '1e999', expected a number that FP64 can hold")):
            self.refused(CHAT, b'{"messages":[{"role":"user","content":"Hi"}],"temperature":%s}' % text.encode(),
                         400, words)
        chat('temperature: expected a number, got "hot"', param="temperature", temperature="hot")
        chat("temperature: -1 is out of range: 0.0 to 2.0", param="temperature", temperature=-1)
        chat("max_tokens: -5 is out of range: at least 0", param="max_tokens", max_tokens=-5)
        chat("max_completion_tokens: -5 is out of range", param="max_completion_tokens", max_completion_tokens=-5)
        chat("n: 99 is out of range: at least 1 and at most 4", param="n", n=99)
        chat("messages: expected a non-empty list of {role, content}, got an empty one", param="messages",
             messages=[])
        chat("messages[0].role: 'robot', expected system, user or assistant", param="messages[0].role",
             messages=[{"role": "robot", "content": "Hello"}])
        chat("no model gpt-9, expected default, vN or default@vN", 404, "model", model="gpt-9")
        self.refused(CHAT, b"[]", 400, "the body is array, expected a JSON object")
        self.refused(CHAT, b'"' + b"a" * 900_000, 400, "missing closing quote")

    def test_prompts_beyond_the_context(self):
        room = f"tokens, at most {CONTEXT - 1} fit the context of {CONTEXT}"
        self.refused(CHAT, {"messages": [{"role": "user", "content": TOO_LONG}]}, 400, room)
        self.refused(COMPLETIONS, {"prompt": TOO_LONG}, 400, room)
        self.refused(COMPLETIONS, {"prompt": [5] * CONTEXT}, 400, f"prompt: {CONTEXT} {room}")
        self.refused(COMPLETIONS, {"prompt": [5] * CONTEXT, "stream": True}, 400, f"prompt: {CONTEXT} {room}")
        self.refused("/v1/embeddings", {"input": TOO_LONG}, 400, f"at most {CONTEXT} fit the context")
        # One less fits: the limit is what the message says.
        self.dsd.post(COMPLETIONS, {"prompt": [5] * (CONTEXT - 1), "max_tokens": 1})

    def test_token_ids(self):
        expected = "expected a string, a list of strings, token ids below 640"
        for prompt, found in (([5, 640], "prompt[1] is 640"), ([-1], "prompt[0] is -1"),
                              ([5, 1 << 64], "prompt[1] is 1.84"), ([[5], [5, 0.5]], "prompt[1][1] is 0.5"),
                              ([[5], "x", True], "prompt[2] is true"), ({}, "got {}")):
            self.refused(COMPLETIONS, {"prompt": prompt}, 400, found, "prompt")
            self.refused(COMPLETIONS, {"prompt": prompt}, 400, expected, "prompt")

    def test_unknown_operations(self):
        self.refused("/v1/dance", {}, 404, "no route /v1/dance")
        self.refused("/ds/v1/feedback/x/y", None, 404, "no route /ds/v1/feedback/x/y", method="GET")
        self.refused(CHAT, {}, 405, f"PATCH {CHAT}: use POST", method="PATCH")
        self.refused("/ds/v1/feedback", {"kind": "label", "model": "digits", "input": {"attachment": 0}, "label": 1},
                     400, '"input.attachment" is 0, expected the index of one of the 0 attachments')

    def test_bodies_beyond_the_limit(self):
        self.refused(CHAT, bytes(MAX_BODY + 1), 413, f"the body is larger than {MAX_BODY} bytes")
        self.refused("/ds/v1/feedback", bytes(MAX_BODY + 1), 413, f"the body is larger than {MAX_BODY} bytes")
        with self.memory_comes_back():
            piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
            self.assertIn(" 413 ", self.pour(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n"
                                             "Transfer-Encoding: chunked\r\n\r\n".encode(), piece))

    def test_headers_of_a_hundred_megabytes(self):
        start = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        with self.memory_comes_back():
            for head, piece in ((start, b"X-Pad: " + b"a" * 60_000 + b"\r\n"),  # many fields
                                (start + b"X-Pad: ", b"a" * 65_536),            # one
                                (b"GET /", b"a" * 65_536)):                     # no end of the target
                self.assertIn(" 431 ", self.pour(head, piece))


if __name__ == "__main__":
    unittest.main()
