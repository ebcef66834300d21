# SPDX-License-Identifier: Apache-2.0
"""The daemon learns while two clients each ask a question every three seconds: how long until a
correction is in the answer, and what it did to everything else. Real daemon, sockets and model.

  build/venv/bin/python tests/bench/learn_bench.py [--singles 20] [--batch 20] [--rounds 5x4] [--seed 1]

Prints one table with 95 % Wilson intervals; 0 leaves a part out. correction_bench measures the learner
alone, and draws the facts for this one."""
import argparse
import json
import math
import pathlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "e2e"))
from daemon import BIN, Daemon, need  # noqa: E402

need("zmq")
from feedback import FeedbackClient  # noqa: E402

EVERY_S, CLIENTS, ASKED_AT_ONCE = 3.0, 2, 8
SETTLED = ("served", "held", "quarantined", "reverted")


def interval(hit, of):
    """Wilson's 95 % interval of a share, in percent."""
    p, z = hit / of, 1.96
    middle, scale = p + z * z / (2 * of), 1 + z * z / of
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return 100 * (middle - half) / scale, 100 * (middle + half) / scale


class Load:
    """Clients that each ask every three seconds, as people would, until the end of the block."""

    def __init__(self, dsd, questions):
        self.dsd, self.questions, self.over = dsd, questions, threading.Event()
        self.latencies, self.failed = [], []
        self.threads = [threading.Thread(target=self.ask, args=(i,)) for i in range(CLIENTS)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def ask(self, index):
        while not self.over.is_set():
            started = time.monotonic()
            try:
                self.dsd.ask(self.questions[index % len(self.questions)])
            except Exception as error:  # pylint: disable=broad-except
                self.failed.append(str(error))
            index += CLIENTS
            self.latencies.append(time.monotonic() - started)
            self.over.wait(max(0.0, EVERY_S - (time.monotonic() - started)))


class Bench:
    def __init__(self, dsd, drawn, feedback):
        self.dsd, self.feedback = dsd, feedback
        self.facts = drawn["facts"]
        self.unrelated = drawn["unrelated"]
        known = self.all_say([(u["question"], u["key"]) for u in self.unrelated])
        self.unrelated = [u for u, right in zip(self.unrelated, known) if right]
        reference = json.loads((HERE.parent / "data/smollm2/reference.json").read_text())
        self.texts = [text["ids"][:160] for text in reference["teacher_forced"]]
        self.base_loss = self.held_out_loss()

    def all_say(self, pairs):
        """Whether the answer to each question has its value in it."""
        def says(pair):
            return pair[1].lower() in self.dsd.ask(pair[0])[0].lower()
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            return list(pool.map(says, pairs))

    def held_out_loss(self):
        total, count = 0.0, 0
        for ids in self.texts:
            answer = self.dsd.post("/v1/completions", {"prompt": ids, "max_tokens": 0, "echo": True,
                                                       "logprobs": 0})
            seen = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
            total, count = total - sum(seen), count + len(seen)
        return total / count

    def teach(self, facts, patience_s=600):
        """Sends the facts as corrections of what was answered; seconds until each is served."""
        answers = [self.dsd.ask(fact["question"])[1]["id"] for fact in facts]
        ids, started = {}, time.monotonic()
        for fact, response in zip(facts, answers):
            ack = self.feedback.send({"kind": "correction", "response_id": response,
                                      "correction": fact["answer"]})
            ids[ack["id"]] = time.monotonic()
        served = {}
        while len(served) < len(ids) and time.monotonic() - started < patience_s:
            for name, sent in ids.items():
                if name in served:
                    continue
                fate = self.dsd.get(f"/ds/v1/feedback/{name}")["fate"][-1]
                if fate["state"] in SETTLED:
                    served[name] = (fate, time.monotonic() - sent)
            time.sleep(0.2)
        lost = [f"{fate['state']}: {fate.get('reason', '')}" for fate, _ in served.values()
                if fate["state"] != "served"]
        if lost:
            print(f"  not served: {lost}")
        return [seconds for _, seconds in served.values()]

    def measure(self, facts):
        return {"same": self.all_say([(f["question"], f["value"]) for f in facts]),
                "para": self.all_say([(q, f["value"]) for f in facts for q in f["paraphrases"]]),
                "near": self.all_say([(q, f["value"]) for f in facts for q in f["near_misses"]]),
                "kept": self.all_say([(u["question"], u["key"]) for u in self.unrelated]),
                "held": [100 * (self.held_out_loss() / self.base_loss - 1)]}

    def back_to_base(self):
        self.dsd.post("/ds/v1/versions/rollback", {"to": "v1"})
        self.dsd.post("/ds/v1/versions/unpin", {})


def row(name, result, seconds, load):
    def share(hits):
        low, high = interval(sum(hits), len(hits))
        return f"{sum(hits)}/{len(hits)} [{low:.0f}, {high:.0f}]"

    held = result["held"]
    kept = 14 * sum(result["kept"]) / len(result["kept"])
    wait = sorted(load.latencies)
    print(f"| {name} | {share(result['same'])} | {share(result['para'])} | {share(result['near'])} | "
          f"{kept:.2f} ({share(result['kept'])}) | {sum(held) / len(held):+.2f} % (max {max(held):+.2f}) | "
          f"{sum(seconds) / len(seconds):.1f} s (max {max(seconds):.1f}) | "
          f"{wait[len(wait) // 2]:.2f} s, {len(load.failed)} failed |", flush=True)


def add(total, result):
    for name, values in result.items():
        total.setdefault(name, []).extend(values)


def run(arguments):
    rounds, group = (int(n) for n in arguments.rounds.split("x")) if "x" in arguments.rounds else (0, 0)
    count = max(arguments.singles, arguments.batch, rounds * group)
    drawn = json.loads(subprocess.check_output(
        [BIN / "correction_bench", "facts", "--facts", str(count), "--seed", str(arguments.seed)]))
    with Daemon() as dsd, FeedbackClient(dsd.ready["data"], "bench") as feedback:
        bench = Bench(dsd, drawn, feedback)
        questions = ["What is the capital of Italy?", "Tell me a short joke.", "What do bees make?"]
        print(f"{len(bench.unrelated)} unrelated questions, held-out loss {bench.base_loss:.4f}\n"
              "| taught | same | paraphrases | near misses taken | unrelated kept of 14 | held-out loss | "
              "in the answer after | clients' wait |\n|---|---|---|---|---|---|---|---|", flush=True)
        if arguments.singles:
            total, seconds = {}, []
            with Load(dsd, questions) as load:
                for fact in bench.facts[:arguments.singles]:
                    seconds += bench.teach([fact])
                    add(total, bench.measure([fact]))
                    bench.back_to_base()
            row(f"{arguments.singles} singles", total, seconds, load)
        if arguments.batch:
            facts = bench.facts[:arguments.batch]
            with Load(dsd, questions) as load:
                seconds = bench.teach(facts)
            row(f"{arguments.batch} at once", bench.measure(facts), seconds, load)
            bench.back_to_base()
        if rounds:
            facts, seconds = bench.facts[:rounds * group], []
            with Load(dsd, questions) as load:
                for at in range(0, len(facts), group):
                    seconds += bench.teach(facts[at:at + group])
            row(f"{rounds} rounds of {group}", bench.measure(facts), seconds, load)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--singles", type=int, default=20)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--rounds", default="5x4")
    parser.add_argument("--seed", type=int, default=1)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
