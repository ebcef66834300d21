# SPDX-License-Identifier: Apache-2.0
"""Wrong starts are refused with a message that says what, which, got and expected; wrong messages are
answered, and the daemon goes on."""
import json
import os
import pathlib
import random
import socket
import tempfile
import unittest

from daemon import Daemon, model_file, need

zmq = need("zmq")


class WrongStart(unittest.TestCase):
    def expect_refusal(self, daemon, *words):
        try:
            said = daemon.refusal()
            for word in words:
                self.assertIn(str(word), said)
            self.assertNotIn("terminate called", said)
            self.assertFalse((daemon.run / "ready.json").exists())
        finally:
            daemon.__exit__(None)

    def test_port_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            self.expect_refusal(Daemon(http_address=address), address)

    def test_second_daemon_on_the_same_data(self):
        with Daemon() as first:
            self.expect_refusal(Daemon(data=first.data), first.data)
            self.assertIn("status", first.get("/health"))

    def test_another_model_over_an_old_data_folder(self):
        with tempfile.TemporaryDirectory() as folder:
            # The same file name with another content is the same model name with another hash.
            name = model_file().name
            changed = pathlib.Path(folder, name)
            raw = bytearray(model_file().read_bytes())
            raw[-1] ^= 1
            changed.write_bytes(raw)
            with Daemon() as first:
                self.assertEqual(first.stop(), 0)
                self.expect_refusal(Daemon(model=changed, data=first.data), "b179c952")

    def test_truncated_model(self):
        with tempfile.TemporaryDirectory() as folder:
            for length in (0, 3, 24, 1000, 1_000_000, model_file().stat().st_size - 1):
                cut = pathlib.Path(folder, "cut.gguf")
                with model_file().open("rb") as whole:
                    cut.write_bytes(whole.read(length))
                with self.subTest(length):
                    self.expect_refusal(Daemon(model=cut), "cut.gguf")

    def test_device(self):
        self.expect_refusal(Daemon(device="gpu"), '--device is "gpu", expected auto, cpu or cuda:N')
        self.expect_refusal(Daemon(device="cuda:"), '"cuda:", expected auto, cpu or cuda:N')
        self.expect_refusal(Daemon(device="cuda:99"), "cuda:99: ")  # no such GPU, no driver or no kernels
        with Daemon(device="cpu") as dsd:
            self.assertIn("device: cpu-", dsd.log_text())

    def test_no_model(self):
        self.expect_refusal(Daemon(model="/nonexistent/model.gguf"), "/nonexistent/model.gguf")

    def test_unknown_setting(self):
        self.expect_refusal(Daemon(settings={"learn.min_itens": 3}), "learn.min_itens",
                            "learn.min_items")

    def test_setting_out_of_range(self):
        self.expect_refusal(Daemon(settings={"gate.max_drop": "lots"}), "gate.max_drop", "lots")
        self.expect_refusal(Daemon(settings={"serve.context": -1}), "serve.context", "-1")


class WrongMessages(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dsd = cls.enterClassContext(Daemon())

    def setUp(self):
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.addCleanup(self.socket.close, linger=0)
        self.socket.connect(self.dsd.ready["data"])

    def exchange(self, *frames):
        self.socket.send_multipart(frames)
        self.assertTrue(self.socket.poll(10_000), f"no answer to {frames}")
        return json.loads(self.socket.recv_multipart()[-1])

    def say(self, **header):
        return self.exchange(json.dumps({"v": 1, **header}).encode())

    def hello(self, client):
        reply = self.say(op="hello", client=client, epoch=1)
        self.assertEqual(reply["op"], "hello")
        return reply

    def test_feedback_before_hello(self):
        reply = self.say(op="feedback", client="early", epoch=1, seq=1,
                         record={"kind": "text", "text": "x"})
        self.assertEqual((reply["op"], reply["code"]), ("error", "no_hello"))

    def test_garbage_frames_are_answered(self):
        self.hello("garbage")
        seed = int.from_bytes(os.urandom(4), "little")
        print(f"seed {seed}")
        chance = random.Random(seed)
        samples = [b"{", b"null", b"[]", b"\xff\xfe", b'{"v":1}', b'{"v":2,"op":"hello"}',
                   b'{"v":1,"op":"dance"}', b"[" * 100_000, b'{"op":' * 10_000,
                   b'{"v":1,"op":"feedback","seq":-1}', b'{"v":1,"op":"feedback","seq":1e400}']
        samples += [chance.randbytes(chance.randrange(1, 2000)) for _ in range(200)]
        for sample in samples:
            self.assertEqual(self.exchange(sample)["op"], "error", sample[:80])
        self.assertEqual(self.hello("garbage")["last_seq"], 0)

    def test_records_are_checked(self):
        self.hello("records")
        for record, word in (({"kind": "rating", "rating": 3}, "rating"),
                             ({"kind": "poem"}, "kind"),
                             ({"kind": "demonstration", "messages": []}, "messages"),
                             ({"kind": "correction", "correction": "x", "response_id": 7},
                              "response_id")):
            reply = self.say(op="feedback", client="records", epoch=1, seq=1, record=record)
            self.assertEqual(reply["op"], "error", record)
            self.assertEqual(reply["seq"], 1)
            self.assertIn(word, reply["message"])

    def test_sequence_numbers(self):
        self.hello("numbers")

        def feedback(seq, text, epoch=1):
            return self.say(op="feedback", client="numbers", epoch=epoch, seq=seq,
                            record={"kind": "text", "text": text})
        first = feedback(1, "one")
        self.assertEqual((first["op"], first["duplicate"]), ("ack", False))
        again = feedback(1, "one")
        self.assertEqual((again["offset"], again["id"], again["duplicate"]),
                         (first["offset"], first["id"], True))
        self.assertEqual(feedback(1, "another")["code"], "seq_conflict")
        gap = feedback(5, "five")
        self.assertEqual((gap["code"], gap["expected"]), ("seq_gap", 2))
        self.assertEqual(self.say(op="hello", client="numbers", epoch=2)["last_seq"], 0)
        self.assertEqual(feedback(1, "one", epoch=2)["duplicate"], False)  # from here on, 1 is stale
        self.assertEqual(feedback(1, "one", epoch=1)["code"], "stale_epoch")

    def test_wrong_http(self):
        for method, path, body, status in (
                ("GET", "/nowhere", None, 404), ("DELETE", "/v1/chat/completions", None, 405),
                ("POST", "/v1/chat/completions", b"{", 400),
                ("POST", "/v1/chat/completions", b"\xff\xff", 400),
                ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
                ("POST", "/ds/v1/versions/rollback", {"to": "v999"}, 404),
                ("GET", "/ds/v1/feedback/fb_0", None, 404)):
            with self.subTest(path=path, body=body):
                got, answer = self.dsd.call(method, path, body)
                self.assertEqual(got, status, answer)
                self.assertTrue(answer["error"]["message"])

    def test_admin_needs_the_control_socket(self):
        status, answer = self.dsd.call("POST", "/ds/v1/versions/rollback", {"to": "v1"}, admin=False)
        self.assertEqual(status, 403, answer)

    def tearDown(self):
        self.assertEqual(self.dsd.get("/health"), {"status": "ok"})


if __name__ == "__main__":
    unittest.main()
