# SPDX-License-Identifier: Apache-2.0
"""Fifty new generations of a plugin under four streams that never stop, on the real model: no request
fails and every text is, letter by letter, what it was before the first reload. A generation that cannot
serve changes nothing."""
import os
import pathlib
import shutil
import threading
import unittest

from daemon import BIN, Daemon

RELOADS, RELOADS_TO_AN_ANSWER, MAX_TOKENS, PATIENCE_S = 50, 4, 48, 120
ENCODER_RELOADS = 10
MODULES = BIN.parent / "modules"
QUESTIONS = ["What is the capital of France?", "Write a short poem about the sea.",
             "How do I boil an egg?", "Name three colors."]


class Streams:
    """Four clients that ask their question again and again; each answer must be the first one."""

    def __init__(self, dsd):
        self.dsd, self.over, self.wrong, self.count = dsd, threading.Event(), [], 0
        self.answered = threading.Condition()
        self.wanted = [dsd.ask(question, MAX_TOKENS)[0] for question in QUESTIONS]
        self.threads = [threading.Thread(target=self.ask, args=(i,)) for i in range(len(QUESTIONS))]

    def ask(self, index):
        while not self.over.is_set():
            try:
                text = self.dsd.ask(QUESTIONS[index], MAX_TOKENS)[0]
            except Exception as error:  # pylint: disable=broad-except
                text = f"failed: {error}"
            with self.answered:
                self.count += 1
                self.answered.notify_all()
            if text != self.wanted[index]:
                self.wrong.append((QUESTIONS[index], self.wanted[index], text))

    def wait_for_another(self):
        with self.answered:
            wanted = self.count + 1
            assert self.answered.wait_for(lambda: self.count >= wanted, PATIENCE_S), "no answer"

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()


class PluginReload(unittest.TestCase):
    def reload_under_streams(self, dsd, name):
        with Streams(dsd) as streams:
            for i in range(RELOADS):
                shown = dsd.post("/ds/v1/plugins/reload", {"name": name, "shadow": "refuse"})
                self.assertEqual((shown["shadow"]["source"], shown["shadow"]["differing"]), ("recorded", 0), shown)
                if i % RELOADS_TO_AN_ANSWER == 0:
                    streams.wait_for_another()
            self.assertEqual(shown["generation"], RELOADS + 1)
        self.assertEqual(streams.wrong, [])
        self.assertGreater(streams.count, RELOADS // RELOADS_TO_AN_ANSWER)
        dsd.post("/ds/v1/plugins/retire", {"name": name})
        states = [g["state"] for g in dsd.get(f"/ds/v1/plugins/{name}")["generations"]]
        self.assertEqual(states.count("serving"), 1)
        return streams

    def test_attention(self):
        for name in ("dense", "window-global"):
            with self.subTest(name), Daemon(settings={"learn.enabled": "false", "serve.attention": name}) as dsd:
                self.reload_under_streams(dsd, name)

    def test_encoder(self):
        with Daemon(settings={"learn.enabled": "false"}) as dsd, Streams(dsd) as streams:
            for _ in range(ENCODER_RELOADS):
                dsd.post("/ds/v1/plugins/reload", {"name": "text"})
                streams.wait_for_another()
            self.assertEqual(dsd.get("/ds/v1/plugins/text")["generation"], ENCODER_RELOADS + 1)
            self.assertEqual(streams.wrong, [])

    def test_quantizer(self):
        for name in ("int8", "int4"):
            settings = {"learn.enabled": "false", "model.quant": name, "model.calibrate": "false"}
            with self.subTest(name), Daemon(settings=settings) as dsd:
                self.reload_under_streams(dsd, name)

    def test_other_settings_are_refused_by_the_recorded_calls(self):
        with Daemon(settings={"learn.enabled": "false", "serve.attention": "window-global"}) as dsd:
            before = dsd.ask(QUESTIONS[0], MAX_TOKENS)[0]
            near = {"name": "window-global", "config": {"window": 2, "globals": 0, "sinks": 0}}
            status, answer = dsd.call("POST", "/ds/v1/plugins/reload", near | {"shadow": "refuse"})
            self.assertEqual(status, 409, answer)
            self.assertIn("recorded calls differ", answer["error"]["message"])
            self.assertEqual(dsd.get("/ds/v1/plugins/window-global")["generation"], 1)
            self.assertEqual(dsd.ask(QUESTIONS[0], MAX_TOKENS)[0], before)
            self.assertGreater(dsd.post("/ds/v1/plugins/reload", near)["shadow"]["differing"], 0)
            self.assertNotEqual(dsd.ask(QUESTIONS[0], MAX_TOKENS)[0], before)
            diff = dsd.post("/ds/v1/plugins/diff", {"a": "window-global"})
            self.assertEqual((diff["a"]["generation"], diff["b"]["generation"]), (2, 1))
            self.assertGreater(diff["differing"], 0)
            bench = dsd.post("/ds/v1/plugins/bench", {"name": "window-global", "seconds": 0.2})
            self.assertEqual({call["call"] for call in bench["calls"]}, {"prefill", "decode"})

    def test_a_broken_generation_changes_nothing(self):
        with Daemon(settings={"learn.enabled": "false"}) as dsd:
            before = dsd.ask(QUESTIONS[0], MAX_TOKENS)[0]
            copy = pathlib.Path(dsd.folder) / "dense.so"
            shutil.copy(MODULES / "attention_dense.so", copy)
            os.truncate(copy, copy.stat().st_size // 2)
            status, answer = dsd.call("POST", "/ds/v1/plugins/reload", {"name": "dense", "path": str(copy)})
            self.assertEqual(status // 100, 4, answer)
            self.assertIn("dense.so", answer["error"]["message"])
            self.assertEqual(dsd.get("/ds/v1/plugins/dense")["generation"], 1)
            self.assertEqual(dsd.ask(QUESTIONS[0], MAX_TOKENS)[0], before)


if __name__ == "__main__":
    unittest.main()
