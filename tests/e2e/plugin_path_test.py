# SPDX-License-Identifier: Apache-2.0
"""The path of somebody who writes a plugin: dsctl plugin new, build, load, serve the model with it. No edit of
Driftstone, nothing but what this build offers as a package. Then what the built-in formats do to the model."""
import json
import math
import pathlib
import subprocess
import tempfile
import time
import unittest

from daemon import BIN, REPOSITORY, Daemon

FIVE_MINUTES_S = 300
TEXTS = json.loads((REPOSITORY / "tests/data/smollm2/reference.json").read_text())["teacher_forced"]


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=FIVE_MINUTES_S,
                          check=False, **options)
    if done.returncode != 0:
        raise AssertionError(f"{words}: exit {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def perplexity(dsd):
    total, count = 0.0, 0
    for text in TEXTS:
        answer = dsd.post("/v1/completions", {"prompt": text["ids"][:160], "max_tokens": 0, "echo": True,
                                              "logprobs": 0})
        seen = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        total, count = total - sum(seen), count + len(seen)
    return math.exp(total / count)


class PluginPath(unittest.TestCase):
    def test_from_nothing_to_serving(self):
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ds-plugin-") as folder, \
             Daemon(settings={"learn.enabled": "false"}) as dsd:
            run("cmake", "--install", BIN.parent, "--component", "sdk", "--prefix", folder + "/sdk")
            dsd.ctl("plugin", "new", "my-nf4", "--kind", "quantizer", "--in", folder)
            source, build = folder + "/my-nf4", folder + "/my-nf4/build"
            run("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={folder}/sdk")
            run("cmake", "--build", build)
            file = str(next(pathlib.Path(build).glob("*.so")))
            self.assertIn("is not allowed", json.loads(dsd.ctl("plugin", "explain", file, "-o", "json",
                                                               expect=8))["steps"][2]["text"])
            dsd.ctl("plugin", "load", file, "--trust")
            dsd.ctl("config", "set", "model.quant", "my-nf4")
            text, answer = dsd.ask("What is the capital of France?")
            self.assertTrue(text)
            self.assertEqual(answer["choices"][0]["finish_reason"], "stop")
            listed = {p["name"]: p for p in dsd.get("/ds/v1/plugins")["plugins"]}
            self.assertEqual(listed["my-nf4"]["state"], "serving")
        self.assertLess(time.monotonic() - started, FIVE_MINUTES_S)

    def test_it_is_there_after_a_restart(self):
        with tempfile.TemporaryDirectory(prefix="ds-plugin-") as folder:
            data = folder + "/data"
            copy = pathlib.Path(folder) / "own-dense.so"
            copy.write_bytes((BIN.parent / "modules" / "quantizer_int8.so").read_bytes() + b"\0")
            copy.chmod(0o700)
            with Daemon(data=data, settings={"learn.enabled": "false"}) as dsd:
                dsd.ctl("plugin", "load", str(copy), "--trust")
                self.assertEqual(dsd.get("/ds/v1/plugins/int8")["generation"], 2)
            with Daemon(data=data, settings={"learn.enabled": "false", "model.quant": "int8"}) as dsd:
                self.assertEqual(dsd.get("/ds/v1/plugins/int8")["origin"], "installed")

    def test_an_encoder_of_ones_own_reaches_the_answers(self):
        question = "What is the capital of France?"
        with Daemon(settings={"learn.enabled": "false"}) as dsd:
            before = dsd.ask(question, 8)[0]
            dsd.ctl("plugin", "load", str(BIN.parent / "tests/daemon/encoder_probe.so"), "width=576", "--trust")
            for name, why in {"nobody": "there are: deaf, fails", "deaf": "does not read text",
                              "other-tensor": "reads the tensor", "too-wide": "plans rows [1, 577]",
                              "fails": "not today"}.items():
                status, answer = dsd.call("POST", "/ds/v1/config", {"name": "serve.encoder", "value": name})
                self.assertGreaterEqual(status, 400, answer)
                self.assertIn(why, answer["error"]["message"])
                self.assertEqual(dsd.ask(question, 8)[0], before)
            dsd.ctl("config", "set", "serve.encoder", "own-rows")
            self.assertNotEqual(dsd.ask(question, 8)[0], before)
            dsd.ctl("config", "set", "serve.encoder", "text")
            self.assertEqual(dsd.ask(question, 8)[0], before)

    def test_perplexity_of_the_built_in_formats(self):
        settings = {"learn.enabled": "false", "serve.precision": "fp32", "model.calibrate": "false"}
        with Daemon(settings=settings) as dsd:
            exact = perplexity(dsd)
            for name, allowed in (("int8", 0.01), ("int4", 0.06)):
                dsd.ctl("config", "set", "model.quant", name)
                self.expect_within(dsd, exact, name, allowed)
            dsd.ctl("config", "set", "model.quant", "file")
            self.assertEqual(perplexity(dsd), exact)  # bit for bit back
        settings |= {"model.quant": "int4", "model.calibrate": "true"}
        with Daemon(settings=settings, patience_s=300) as dsd:
            self.expect_within(dsd, exact, "calibrated int4", 0.06)

    def test_a_signal_ends_a_start_that_calibrates(self):
        dsd = Daemon(settings={"learn.enabled": "false", "model.quant": "int4"})
        try:
            dsd.launch()
            while "int4: sees the inputs" not in dsd.log_text():
                self.assertIsNone(dsd.process.poll(), dsd.log_text())
                time.sleep(0.02)
            self.assertEqual(dsd.stop(), 0)
            self.assertIn("stopping on SIGTERM", dsd.log_text())
            self.assertNotIn("ready:", dsd.log_text())
        finally:
            dsd.kill()

    def expect_within(self, dsd, exact, name, allowed):
        rise = perplexity(dsd) / exact - 1
        print(f"{name}: perplexity {100 * rise:+.2f} % of FP32 {exact:.3f}")
        self.assertLess(rise, allowed, name)


if __name__ == "__main__":
    unittest.main()
