#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Asks over ZeroMQ and prints the answer as it comes: ask.py "What is the capital of France?"

The last line, on stderr, has the response id that feedback.py --response wants, and the version of the
weights that answered."""
import argparse
import json
import sys

import zmq

from feedback import read_ready


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--run", help="the daemon's run folder (default: as feedback.py)")
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()

    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.connect(read_ready(options.run)["data"])
    socket.send_json({"v": 1, "op": "hello", "client": "ask", "epoch": 1})
    socket.send_json({"v": 1, "op": "infer", "id": "1", "stream": True, "temperature": 0,
                      "max_tokens": options.max_tokens,
                      "messages": [{"role": "user", "content": options.question}]})
    while True:
        if not socket.poll(60_000):
            sys.exit("no answer for a minute")
        message = json.loads(socket.recv_multipart()[0])
        if message["op"] == "error":
            sys.exit(f"{message['code']}: {message['message']}")
        if message["op"] == "token":
            print(message["text"], end="", flush=True)
        if message["op"] == "done":
            print()
            print(f"{message['response_id']}  {message['version']}", file=sys.stderr)
            break
    socket.close(linger=0)


if __name__ == "__main__":
    try:
        main()
    except OSError as problem:
        sys.exit(f"ask.py: {problem}")
