# SPDX-License-Identifier: Apache-2.0
"""Faults of the GPU under a running dsd: what it must do, whatever makes the GPU fail. Standard library only.

As a program, on a machine with a GPU: the real thing, 20 times each (tests/gpu.sh, row faults).

  gpu_faults.py faults|shortages [--times N]      programs by DS_BIN_DIR, model by DS_MODEL, as the other tests

A kernel that writes where nothing is comes from tests/faulty/breaker.cpp; a lack of memory from
tests/faulty/hog, which takes what is free."""
import argparse
import http.client
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

from daemon import BIN, Daemon, UnixConnection

PROMPTS = ["What is the capital of France?", "What is the capital of Italy?", "Count from one to ten.",
           "Name the first four letters of the alphabet.", "What is two plus two?", "Say hello to Anna.",
           "What colour is the sky?", "Who wrote Hamlet?", "List three fruits.", "What do cows drink?"]
TOKENS = 40


def wait_for(what, condition, patience_s=60.0):
    """The seconds until `condition` gives something, and that; errors of the wire count as not yet."""
    start = time.monotonic()
    while time.monotonic() - start < patience_s:
        try:
            got = condition()
        except (OSError, http.client.HTTPException, AssertionError, ValueError):
            got = None
        if got:
            return time.monotonic() - start, got
        time.sleep(0.01)
    raise AssertionError(f"not within {patience_s} s: {what}")


class Stream(threading.Thread):
    """One streamed answer over the control socket."""

    def __init__(self, dsd, prompt):
        super().__init__(daemon=True)
        self.dsd, self.prompt, self.text, self.pieces, self.reason, self.error = dsd, prompt, "", 0, None, None
        self.begun = threading.Event()
        self.start()

    def run(self):
        try:
            connection = UnixConnection(self.dsd.ready["control"], 120)
            body = {"messages": [{"role": "user", "content": self.prompt}], "temperature": 0,
                    "max_tokens": TOKENS, "stream": True}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise AssertionError(f"{answer.status}: {answer.read()}")
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise AssertionError(str(event["error"]))
                choice = event["choices"][0]
                self.text += choice["delta"].get("content") or ""
                self.reason = choice["finish_reason"] or self.reason
                self.pieces += 1
                if self.pieces >= 3:
                    self.begun.set()
            connection.close()
        except Exception as error:  # pylint: disable=broad-except
            self.error = error
        self.begun.set()


class ReadyWatch(threading.Thread):
    """Looks all the time whether /ready claims what /health denies."""

    def __init__(self, dsd):
        super().__init__(daemon=True)
        self.dsd, self.lies, self.looks, self.stop = dsd, 0, 0, threading.Event()
        self.start()

    def run(self):
        def lost():
            return self.dsd.get("/health").get("device", {}).get("state") == "lost"
        while not self.stop.is_set():
            try:
                before, (status, _), after = lost(), self.dsd.call("GET", "/ready"), lost()
                self.looks += 1
                self.lies += before and after and status == 200
            except (OSError, http.client.HTTPException, AssertionError, ValueError):
                time.sleep(0.01)  # it is starting anew
            time.sleep(0.002)


class Faults:
    """`right`: the answer to each prompt."""

    def __init__(self, dsd, right):
        self.dsd, self.right, self.results, self.first_rss = dsd, right, [], None
        self.watch = ReadyWatch(dsd)

    def device(self):
        return self.dsd.get("/ds/v1/status")["device"]

    def insist(self, path, body):
        """The answer, asked for again while the daemon starts anew. Any other refusal is a failure."""
        def once():
            status, answer = self.dsd.call("POST", path, body)
            if status == 503 and answer["error"]["code"] in ("unavailable", "shutting_down"):
                return None
            if status != 200:
                raise SystemError(f"{path}: {status} {answer}")
            return answer
        return wait_for(path, once)[1]

    def ask(self, prompt):
        answer = self.insist("/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}],
                                                      "temperature": 0, "max_tokens": TOKENS})
        return answer["choices"][0]["message"]["content"]

    def process(self):
        """Resident bytes, open files and dead children of the daemon."""
        pid, proc = self.dsd.process.pid, pathlib.Path("/proc")
        status = (proc / str(pid) / "status").read_text()
        rss = int(status.split("VmRSS:")[1].split()[0]) * 1024
        dead = 0
        for folder in proc.iterdir():
            if folder.name.isdigit():
                try:
                    words = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                dead += words[0] == "Z" and words[1] == str(pid)
        return {"rss": rss, "files": len(list((proc / str(pid) / "fd").iterdir())), "dead_children": dead}

    def begin(self, count):
        streams = [Stream(self.dsd, prompt) for prompt in list(self.right)[:count]]
        for stream in streams:
            stream.begun.wait(60)
        return streams

    def check(self, streams):
        for stream in streams:
            stream.join(120)
            assert stream.error is None, f"{stream.prompt}: {stream.error}"
            assert stream.reason in ("stop", "length"), f"{stream.prompt}: ended by {stream.reason}"
            assert stream.text == self.right[stream.prompt], \
                f"{stream.prompt}: {stream.text!r}, expected {self.right[stream.prompt]!r}"

    def fault(self, happen, kind):
        """`happen` makes the GPU fail while streams run; new questions come all the time."""
        assert self.device()["state"] == "ok", self.device()
        streams = self.begin(3)
        start = time.monotonic()
        happen()
        prompt = list(self.right)[-1]

        def answered():
            text, degraded = self.ask(prompt), self.device()["state"] == "cpu_serves"
            assert_right(text, prompt, self.right)
            return degraded
        wait_for("an answer by the CPU", answered)
        cpu_s = time.monotonic() - start
        health = self.dsd.get("/health")
        assert health["status"] == "degraded" and health["device"]["reason"], health
        self.check(streams)
        self.comes_back(start, kind, cpu_s)

    def comes_back(self, start, kind, cpu_s):
        wait_for("the GPU again", lambda: self.device()["state"] == "ok" and self.reload())
        back_s = time.monotonic() - start
        for prompt in list(self.right)[:2]:
            assert_right(self.ask(prompt), prompt, self.right)
        assert self.dsd.get("/health") == {"status": "ok"}
        assert self.dsd.get("/ready")["ready"]
        self.note({"kind": kind, "cpu_s": round(cpu_s, 3), "back_s": round(back_s, 3), **self.process()})

    def reload(self):
        """ready.json of the process that is there now."""
        ready = json.loads((self.dsd.run / "ready.json").read_text())
        assert ready["pid"] == self.dsd.process.pid
        self.dsd.ready = ready
        return True

    def shortage(self, squeeze, release):
        """Memory ends while streams run: they end as they should, on the GPU or on the CPU."""
        streams = self.begin(3)
        squeeze()
        start = time.monotonic()
        try:
            # Passes whose memory grows: logits of a whole prompt, then its final states; chat has no use for either.
            text = "pears and apples " * 12
            scored = self.insist("/v1/completions", {"model": "default", "prompt": text, "max_tokens": 0,
                                                     "echo": True, "logprobs": 1})
            logprobs = scored["choices"][0]["logprobs"]["token_logprobs"]
            assert len(logprobs) > 24 and all(p <= 0 for p in logprobs[1:]), logprobs
            self.insist("/v1/embeddings", {"model": "default", "input": text})
            cpu_s = time.monotonic() - start
            left = self.device()["state"] != "ok"
        finally:
            release()  # before it starts anew
        for prompt in list(self.right)[:2]:
            assert_right(self.ask(prompt), prompt, self.right)
        self.check(streams)
        if left:
            self.comes_back(start, "memory", cpu_s)
        else:
            self.note({"kind": "memory, stayed", "cpu_s": 0.0, "back_s": 0.0, **self.process()})

    def note(self, result):
        self.results.append(result)
        print(json.dumps(result), flush=True)

    def judge(self, cpu_limit_s=None, back_limit_s=None, rss_limit=64 << 20):
        """What has to hold over all of them."""
        self.watch.stop.set()
        self.watch.join()
        first, last = self.results[0], self.results[-1]
        assert self.watch.lies == 0, f"/ready said yes {self.watch.lies} times while nothing was served"
        assert all(r["dead_children"] == 0 for r in self.results), self.results
        assert last["files"] <= first["files"] + 4, f"files: {first['files']} -> {last['files']}"
        grown = max(r["rss"] for r in self.results) - first["rss"]
        assert grown <= rss_limit, f"resident memory grew by {grown >> 20} MiB"
        slowest_cpu, slowest_back = (max(r[k] for r in self.results) for k in ("cpu_s", "back_s"))
        assert cpu_limit_s is None or slowest_cpu <= cpu_limit_s, f"the CPU served after {slowest_cpu} s"
        assert back_limit_s is None or slowest_back <= back_limit_s, f"the GPU came back after {slowest_back} s"
        return (f"{len(self.results)} faults: CPU after {slowest_cpu} s, GPU back after {slowest_back} s at most, "
                f"memory +{grown >> 20} MiB, files {first['files']} -> {last['files']}, "
                f"/ready asked {self.watch.looks} times")


def assert_right(text, prompt, right):
    # AssertionError would count as "not yet" to wait_for().
    if text != right[prompt]:
        raise SystemError(f"WRONG OUTPUT for {prompt!r}: {text!r}, expected {right[prompt]!r}")


def answers(dsd):
    return {prompt: dsd.ask(prompt, TOKENS)[0] for prompt in PROMPTS}


def hog_memory(hog):
    """Takes all GPU memory that is free; returns what gives it back."""
    process = subprocess.Popen([str(hog)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    line = process.stdout.readline()
    assert line.startswith(b"holds"), f"{hog} took nothing"

    def release():
        process.stdin.close()
        process.wait(60)
    return release


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("faults", "shortages"))
    parser.add_argument("--times", type=int, default=20)
    kind, times = (arguments := parser.parse_args()).kind, arguments.times
    tests = BIN.parent / "tests" / "faulty"
    plain = {"learn.enabled": "false"}
    with tempfile.TemporaryDirectory(prefix="ds-faults-") as folder:
        data = pathlib.Path(folder) / "data"
        data.mkdir(mode=0o700)
        os.environ["DS_BREAK_GPU"] = folder
        with Daemon(device="cpu", data=data, settings=plain) as dsd:
            dsd.ctl("plugin", "load", str(tests / "breaker.so"), "--trust")
            on_cpu = answers(dsd)
            dsd.stop()
        settings = {**plain, "serve.attention": "breaker", "device.restarts": str(3 * times)}
        with Daemon(device="cuda:0", data=data, settings=settings, patience_s=120) as dsd:
            # Rounding differs between devices; an answer that both give has no close call in it.
            on_gpu = answers(dsd)
            right = {p: text for p, text in on_gpu.items() if on_cpu[p] == text}
            print(f"{len(right)} of {len(PROMPTS)} answers are the same on both devices")
            assert len(right) >= 4
            faults = Faults(dsd, right)
            held = []
            for _ in range(times):
                if kind == "faults":
                    faults.fault((pathlib.Path(folder) / "fault").touch, "illegal address")
                else:
                    faults.shortage(lambda: held.append(hog_memory(tests / "hog")), lambda: held.pop()())
            print(f"{kind}:", faults.judge(cpu_limit_s=2.0, back_limit_s=10.0))
            assert dsd.stop() == 0


if __name__ == "__main__":
    sys.exit(main())
