#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""gpu_bench's rows by PyTorch and transformers: a Llama of SmolLM2-135M's shapes, random weights, BF16.

  torch_llama.py ROW...    full-BxT, decode-B, prefill-T; needs PyTorch with CUDA and transformers
  torch_llama.py --beside GPU_BENCH [--times N] ROW...
                           the same rows by both, in turn, N times each: medians and the ratio

Training is compiled, with autocast to BF16, FP32 weights and fused AdamW; decode is generate() with its static
cache, compiled, 128 tokens behind 128; a prompt gives its last logits. Median of five after what compiling needs."""
import argparse
import re
import statistics
import subprocess
import sys
import time


def model_of(dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
                         tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    return LlamaForCausalLM(config).to("cuda", dtype)


def seconds_of(step, warm):
    import torch

    for _ in range(warm):
        step()
    took = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def train(batch, tokens):
    import torch

    model = torch.compile(model_of(torch.float32).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, 49152, (batch, tokens), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batch * tokens / seconds_of(step, 4)


def decode(batch):
    import torch

    model = model_of(torch.bfloat16).eval()
    ids = torch.randint(3, 49152, (batch, 128), device="cuda")

    def generate(tokens):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                       do_sample=False, cache_implementation="static", pad_token_id=0)

    # The prompt's own time comes off.
    return batch * 127 / (seconds_of(lambda: generate(128), 3) - seconds_of(lambda: generate(1), 2))


def prefill(tokens):
    import torch

    model = model_of(torch.bfloat16).eval()
    ids = torch.randint(0, 49152, (1, tokens), device="cuda")
    with torch.inference_mode():
        return tokens / seconds_of(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), 3)


def rate_of(row):
    kind, size = row.split("-", 1)
    if kind == "full":
        return train(*map(int, size.split("x")))
    return {"decode": decode, "prefill": prefill}[kind](int(size))


def rate_in(command):
    """The rate that a program of this kind prints; a process of its own, so that nothing stays warm or full."""
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r": ([0-9.]+) tok/s", out.stdout)
    if found is None:
        sys.exit(f"{command}: {out.stdout}{out.stderr[-2000:]}")
    return float(found[1])


def main():
    arguments = argparse.ArgumentParser(usage=__doc__)
    arguments.add_argument("--beside")
    arguments.add_argument("--times", type=int, default=2)
    arguments.add_argument("rows", nargs="+")
    given = arguments.parse_args()
    for row in given.rows:
        if given.beside is None:
            print(f"{row}: {rate_of(row):.0f} tok/s", flush=True)
            continue
        ours, theirs = [], []
        for _ in range(given.times):
            ours.append(rate_in([given.beside, row]))
            theirs.append(rate_in([sys.executable, __file__, re.sub("-fp16$", "", row)]))
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"{row}: {statistics.median(ours):.0f} against {statistics.median(theirs):.0f} tok/s of PyTorch: {ratio:.2f}x",
              flush=True)


if __name__ == "__main__":
    main()
