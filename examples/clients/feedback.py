#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sends feedback to a running dsd over ZeroMQ, and can wait until it has been learned.

As a program:   feedback.py --response ID --correction "The right answer." --wait
                feedback.py --question "Who?" --answer "Me."
As a library:   with FeedbackClient(ready["data"], "my-app") as client: ack = client.send({...})

An acknowledged record is durable. A record without its acknowledgement is sent again under the same
(client, epoch, seq), after a reconnect too; the daemon recognises it and stores it once. So the
outbox below is all the state that a client needs. Needs pyzmq (Debian: python3-zmq).
"""
import argparse
import collections
import json
import os
import pathlib
import sys
import time
import urllib.request
import uuid

import zmq

RESENT = {"busy", "unavailable", "storage_full", "seq_gap", "no_hello"}  # errors that a later try can cure


class FeedbackError(Exception):
    """The daemon refused: .code and .reply say why."""

    def __init__(self, reply):
        super().__init__(f"{reply.get('code')}: {reply.get('message')}")
        self.code, self.reply = reply.get("code"), reply


class FeedbackClient:
    """One (client, epoch) on one DEALER socket. Not for several threads at once."""

    def __init__(self, address, client, epoch=1, silence_s=3.0):
        self.address, self.client, self.epoch = address, client, epoch
        self.silence_s = silence_s           # without a reply for so long, connect anew
        self.outbox = collections.OrderedDict()  # seq -> frames, sent and not yet acknowledged
        self.store = None                    # uuid of the daemon's store, from hello
        self.acked = 0                       # every seq up to here has been acknowledged
        self.socket = None
        self.resend_at = None

    def __enter__(self):
        self.connect()
        self.next_seq = self.acked + 1
        return self

    def __exit__(self, *_):
        self.socket.close(linger=0)

    def connect(self, patience_s=60.0):
        """Says hello on a fresh socket, until it is answered; then sends the outbox again."""
        deadline = time.monotonic() + patience_s
        while True:
            if self.socket:
                self.socket.close(linger=0)
            self.socket = zmq.Context.instance().socket(zmq.DEALER)
            self.socket.connect(self.address)
            self._send([{"v": 1, "op": "hello", "client": self.client, "epoch": self.epoch}])
            reply = self._receive(self.silence_s)
            if reply and reply["op"] == "error" and reply.get("code") not in RESENT:
                raise FeedbackError(reply)
            if reply and reply["op"] == "hello":
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer from {self.address} for {patience_s:.0f} s")
        if self.store not in (None, reply["store"]):
            raise RuntimeError(f"another store: {reply['store']}, it was {self.store}")
        if reply["last_seq"] < self.acked:
            raise RuntimeError(f"{self.acked} records were acknowledged, the store has "
                               f"{reply['last_seq']}")
        if self.store is None:
            self.acked = reply["last_seq"]
        self.store, self.version = reply["store"], reply.get("version")
        self._resend()

    def post(self, record, attachments=()):
        """Sends without waiting; poll() brings the acknowledgement. Returns the seq."""
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        header = {"v": 1, "op": "feedback", "client": self.client, "epoch": self.epoch, "seq": seq,
                  "record": record}
        self.outbox[seq] = [header, *attachments]
        self._send(self.outbox[seq])
        return seq

    def poll(self, wait_s=None):
        """The next acknowledgement, or None if there was none in `wait_s`. Silence means reconnect.
        Raises FeedbackError when a record is refused for good: it leaves the outbox, and those
        after it move up, since a refused record uses no number."""
        if self.resend_at and time.monotonic() >= self.resend_at:
            self._resend()
        reply = self._receive(self.silence_s if wait_s is None else wait_s)
        if reply is None:
            if wait_s is None or wait_s >= self.silence_s:
                self.connect()
            return None
        if reply["op"] == "ack":
            self.outbox.pop(reply["seq"], None)
            self.acked = max(self.acked, reply["seq"])
            return reply
        if reply.get("code") == "no_hello":
            self.connect()  # the daemon was started anew
        elif reply.get("code") in RESENT:
            # What follows a refused record gets seq_gap: one resend, in order, cures all of them.
            pause_s = max(reply.get("retry_after_ms", 0) / 1000, 0.05)
            self.resend_at = self.resend_at or time.monotonic() + pause_s
        elif reply["op"] == "error":
            self._drop(reply.get("seq"))
            raise FeedbackError(reply)
        return None

    def send(self, record, attachments=(), patience_s=60.0):
        """Sends one record and returns its acknowledgement."""
        seq, deadline = self.post(record, attachments), time.monotonic() + patience_s
        while time.monotonic() < deadline:
            ack = self.poll()
            if ack and ack["seq"] == seq:
                return ack
        raise TimeoutError(f"seq {seq} was not acknowledged within {patience_s:.0f} s")

    def _drop(self, refused):
        frames = self.outbox.pop(refused, None)
        if frames is None:
            return
        later = [(seq, frames) for seq, frames in self.outbox.items() if seq > refused]
        for seq, frames in later:
            del self.outbox[seq]
            frames[0]["seq"] = seq - 1
            self.outbox[seq - 1] = frames
        self.next_seq -= 1
        self.connect()  # a late reply on the old socket would speak of the old numbers

    def _resend(self):
        self.resend_at = None
        for frames in self.outbox.values():
            self._send(frames)

    def _send(self, frames):
        header, *attachments = frames
        self.socket.send_multipart([json.dumps(header).encode(), *attachments])

    def _receive(self, wait_s):
        if not self.socket.poll(int(1000 * wait_s)):
            return None
        return json.loads(self.socket.recv_multipart()[0])


def read_ready(run=None):
    """Where the daemon listens: its ready.json, {"data", "events", "control", "http", "version"}."""
    places = [run or os.environ.get("DS_RUN_DIR")]
    if not places[0]:
        user = os.environ.get("XDG_RUNTIME_DIR")
        places = [f"{user}/driftstone"] if user else []
        places += [f"/tmp/driftstone-{os.getuid()}", "/run/driftstone"]
    for place in places:
        file = pathlib.Path(place, "ready.json")
        if file.exists():
            return json.loads(file.read_text())
    raise FileNotFoundError(f"no ready.json in {' or '.join(places)}: is dsd running?")


def get_json(http, path):
    with urllib.request.urlopen(f"http://{http}{path}", timeout=60) as answer:
        return json.load(answer)


def watch_fate(http, feedback_id, started, patience_s):
    """Prints each new state of the item, and how far its training is, until it is learned or refused.
    True when it is served."""
    shown, last_step, next_look_s = 0, 0, 0.0
    while (seconds := time.monotonic() - started) < patience_s:
        fate = get_json(http, f"/ds/v1/feedback/{feedback_id}")["fate"]
        for entry in fate[shown:]:
            if entry["state"] == "served":
                print(f"served   {seconds:6.1f} s  learned in {entry['version']}")
                return True
            note = entry.get("reason") or ""
            print(f"{entry['state']:<8} {seconds:6.1f} s  {note}".rstrip(), flush=True)
            if entry["state"] in ("held", "quarantined", "reverted", "expired", "erased"):
                return False
        shown = len(fate)
        if seconds >= next_look_s:
            next_look_s = seconds + 2
            learn = get_json(http, "/ds/v1/learn")
            if learn["state"] == "training" and learn["step"] > last_step:
                last_step = learn["step"]
                print(f"training {seconds:6.1f} s  step {last_step}, loss {learn['loss']:.3f}",
                      flush=True)
        time.sleep(0.1)
    print(f"not learned within {patience_s:.0f} s", file=sys.stderr)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="the daemon's run folder (default: $DS_RUN_DIR, then where "
                        "dsctl looks)")
    parser.add_argument("--client", default=f"feedback-{uuid.uuid4().hex[:8]}",
                        help="a stable name of yours; the default is a new one each time")
    parser.add_argument("--response", help="id of the answer that is corrected or rated")
    parser.add_argument("--correction", help="what that answer should have been")
    parser.add_argument("--rating", type=float, help="how good that answer was, -1 to 1")
    parser.add_argument("--question", help="a question, with --answer: an example to learn from")
    parser.add_argument("--answer")
    parser.add_argument("--wait", action="store_true", help="wait until it is learned")
    parser.add_argument("--patience", type=float, default=300, metavar="SECONDS")
    options = parser.parse_args()

    if options.response and options.correction:
        record = {"kind": "correction", "response_id": options.response,
                  "correction": options.correction}
    elif options.response and options.rating is not None:
        record = {"kind": "rating", "response_id": options.response, "rating": options.rating}
    elif options.question and options.answer:
        record = {"kind": "demonstration",
                  "messages": [{"role": "user", "content": options.question},
                               {"role": "assistant", "content": options.answer}]}
    else:
        parser.error("give --response with --correction or --rating, or --question with --answer")

    ready = read_ready(options.run)
    started = time.monotonic()
    with FeedbackClient(ready["data"], options.client) as client:
        ack = client.send(record)
    print(f"ack      {time.monotonic() - started:6.1f} s  offset {ack['offset']}, {ack['id']}: "
          f"{ack['state']}, on disk", flush=True)
    if options.wait and not watch_fate(ready["http"], ack["id"], started, options.patience):
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FeedbackError, OSError, RuntimeError) as problem:
        sys.exit(f"feedback.py: {problem}")
