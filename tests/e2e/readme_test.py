# SPDX-License-Identifier: Apache-2.0
"""What README.md shows works as shown: its Python against a running dsd, its dsctl commands, and the
clients in examples/."""
import re
import shlex
import subprocess
import sys
import unittest

from daemon import BIN, REPOSITORY, Daemon, need

need("zmq")
need("openai")
WRONG_USAGE = 2
README = (REPOSITORY / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


class Readme(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dsd = cls.enterClassContext(Daemon(settings={"learn.enabled": "false"}))

    def python(self, *words):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120,
                              check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def shown(self, code, **replacements):
        for old, new in replacements.values():
            self.assertIn(old, code)
            code = code.replace(old, new)
        return self.python("-c", code).stdout

    def test_python(self):
        ask, correct = blocks("python")
        said = self.shown(ask, address=("127.0.0.1:8471", self.dsd.ready["http"]))
        response_id = re.search(r"chatcmpl-\w+", said).group()
        self.assertRegex(said, r"ds-v1-[0-9a-f]{8}")
        ack = self.shown(correct, ready=("/tmp/driftstone-1000", str(self.dsd.run)),
                         response=("chatcmpl-...", response_id))
        feedback_id = re.search(r"fb_[0-9a-f]{20}", ack).group()
        record = self.dsd.get(f"/ds/v1/feedback/{feedback_id}")["record"]
        self.assertEqual(record["response_id"], response_id)

    def test_dsctl_commands(self):
        commands = re.findall(r"^dsctl ([^#\n]*)", "\n".join(blocks("sh")), re.M)
        self.assertGreater(len(commands), 10)
        for command in commands:
            with self.subTest(command):
                # Without a daemon: a command that parses ends with "unreachable" or does its work.
                words = ["--yes", "--run", "/nonexistent", *shlex.split(command)]
                done = subprocess.run([BIN / "dsctl", *words], stdin=subprocess.DEVNULL,
                                      capture_output=True, text=True, timeout=20, check=False)
                self.assertNotEqual(done.returncode, WRONG_USAGE, done.stdout + done.stderr)

    def test_clients(self):
        clients, run = REPOSITORY / "examples" / "clients", str(self.dsd.run)
        answer = self.python(clients / "ask.py", "--run", run, "What is the capital of France?")
        self.assertIn("Paris", answer.stdout)
        response_id, version = answer.stderr.split()
        self.assertEqual(version, "v1")
        for words in (["--response", response_id, "--rating", "1"],
                      ["--response", response_id, "--correction", "Paris."],
                      ["--question", "Who opens the shop?", "--answer", "Anna does."]):
            self.assertIn("on disk", self.python(clients / "feedback.py", "--run", run, *words).stdout)


if __name__ == "__main__":
    unittest.main()
