# SPDX-License-Identifier: Apache-2.0
"""A dsd of one test: private folders, a port of its own, always stopped. Found by the environment:
DS_BIN_DIR = the programs, DS_MODEL = the model file (else the user's cache)."""
import http.client
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples" / "clients"))

BIN = pathlib.Path(os.environ.get("DS_BIN_DIR", REPOSITORY / "build" / "release" / "bin"))
SKIPPED = 77  # what CMake counts as skipped


def need(module):
    """Imports a module of build/venv; without it the test is skipped, or failed under DS_NO_SKIP."""
    try:
        return __import__(module)
    except ImportError:
        print(f"{module} is not installed: tests/run.sh makes build/venv")
        sys.exit(1 if os.environ.get("DS_NO_SKIP") else SKIPPED)


def model_file():
    """The real model, as examples/setup.sh leaves it."""
    if os.environ.get("DS_MODEL"):
        return pathlib.Path(os.environ["DS_MODEL"])
    sha256, name = (REPOSITORY / "examples" / "model.sha256").read_text().splitlines()[-1].split()
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    file = cache / "driftstone" / sha256 / name
    if not file.exists():
        print(f"no model at {file}: examples/setup.sh fetches it")
        sys.exit(1 if os.environ.get("DS_NO_SKIP") else SKIPPED)
    return file


def tiny_chat_model(folder):
    """A random model of 0.3 MB that speaks ChatML, for what needs no sense: rounds take parts of a second."""
    source, folder = REPOSITORY / "tests" / "data" / "tiny" / "tied", pathlib.Path(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(source / name, folder / name)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\\n' }}{% endif %}")
    return folder


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Daemon:
    """with Daemon() as dsd: dsd.get("/ds/v1/status").  `data` may be the folder of an earlier one.
    `memory` bytes are all that it may map; it is ready within `patience_s`. `device`
    is auto unless given."""

    def __init__(self, model=None, data=None, settings=None, http_address="127.0.0.1:0", run=None, memory=None,
                 patience_s=60, device=None):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ds-e2e-"))
        self.data = pathlib.Path(data or self.folder / "data")
        self.run = pathlib.Path(run or self.folder / "run")
        for folder in (self.data, self.run):
            folder.mkdir(mode=0o700, exist_ok=True)
        self.log = self.folder / "dsd.log"
        self.command = [BIN / "dsd", "--model", model or model_file(), "--data", self.data,
                        "--run", self.run, "--http", http_address]
        if device:
            self.command += ["--device", device]
        for name, value in (settings or {}).items():
            self.command += ["--set", f"{name}={value}"]
        self.process, self.ready, self.memory, self.patience_s = None, None, memory, patience_s

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, *_):
        self.kill()
        if kind:
            print(f"--- the end of the log of dsd\n{self.log_text()[-3000:]}", file=sys.stderr)
        shutil.rmtree(self.folder)

    def launch(self):
        limit = (lambda: resource.setrlimit(resource.RLIMIT_AS, (self.memory,) * 2)) if self.memory else None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([str(word) for word in self.command], preexec_fn=limit,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def start(self):
        """Returns when it is ready; raises with its log when it ends or stays silent."""
        file = self.run / "ready.json"
        file.unlink(missing_ok=True)  # of a killed predecessor; dsd removes it too, a moment later
        self.launch()
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            if file.exists():
                self.ready = json.loads(file.read_text())
                if self.ready["pid"] == self.process.pid:
                    return self
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"dsd is not ready (exit {self.process.poll()}):\n{self.log_text()}")

    def refusal(self, patience_s=60):
        """Starts it and expects that it ends by itself with an error: what it said."""
        self.launch()
        status = self.process.wait(patience_s)
        if status == 0 or status < 0:
            raise AssertionError(f"dsd ended with {status}, expected an error:\n{self.log_text()}")
        return self.log_text()

    def stop(self, patience_s=15):
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience_s)

    def kill(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def log_text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def call(self, method, path, body=None, admin=True, timeout_s=120):
        """(status, parsed answer) over the control socket, or over TCP without `admin`."""
        if admin:
            connection = UnixConnection(self.ready["control"], timeout_s)
        else:
            connection = http.client.HTTPConnection(self.ready["http"], timeout=timeout_s)
        raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, raw, {"content-type": "application/json"} if raw else {})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        is_json = "json" in (answer.getheader("content-type") or "")
        return answer.status, json.loads(text) if is_json else text.decode()

    def get(self, path, **options):
        return self._expect_ok("GET", path, *self.call("GET", path, **options))

    def post(self, path, body, **options):
        return self._expect_ok("POST", path, *self.call("POST", path, body, **options))

    def ask(self, question, max_tokens=48, **options):
        """The greedy answer and the whole response."""
        answer = self.post("/v1/chat/completions", {
            "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": max_tokens, **options})
        return answer["choices"][0]["message"]["content"], answer

    def ctl(self, *words, expect=0):
        """dsctl's stdout."""
        done = subprocess.run([str(BIN / "dsctl"), "--run", str(self.run), *words],
                              capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != expect:
            raise AssertionError(f"dsctl {words}: exit {done.returncode}, expected {expect}\n"
                                 f"{done.stdout}{done.stderr}")
        return done.stdout

    @staticmethod
    def _expect_ok(method, path, status, answer):
        if status // 100 != 2:
            raise AssertionError(f"{method} {path}: {status} {answer}")
        return answer
