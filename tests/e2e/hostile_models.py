# SPDX-License-Identifier: Apache-2.0
"""Model files of which every field can be set to anything, made from the tiny model: as GGUF, and as a Hugging
Face folder. Left alone, both are whole models that dsd serves."""
import copy
import json
import math
import pathlib
import struct

from daemon import tiny_chat_model

U32, F32, STRING, ARRAY = 4, 6, 8, 9  # types of GGUF metadata
Q4_0, BF16 = 2, 30                    # tensor types of ggml
ALIGNMENT = 32


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


class SafeTensors:
    """header: the JSON as a dict; data: the bytes behind it. header_bytes: a false length for the file to claim."""

    def __init__(self, file):
        raw = pathlib.Path(file).read_bytes()
        length, = struct.unpack("<Q", raw[:8])
        self.header, self.data, self.header_bytes = json.loads(raw[8:8 + length]), raw[8 + length:], None

    def tensors(self):
        for name, entry in self.header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, entry, self.data[begin:end]

    def write(self, file):
        header = json.dumps(self.header).encode()
        claimed = len(header) if self.header_bytes is None else self.header_bytes
        pathlib.Path(file).write_bytes(u64(claimed) + header + self.data)


class Gguf:
    """keys: {name: (type, raw value)}. tensors: {name: {dims (innermost first), type, data, offset}}; without an
    offset a tensor lies behind the one before. again: raw entries to append to either list."""

    def __init__(self):
        self.version, self.keys, self.tensors = 3, {}, {}
        self.n_keys = self.n_tensors = None  # false counts for the header to claim
        self.again = {"key": b"", "tensor": b""}
        self.more = {"key": 0, "tensor": 0}

    def put(self, name, kind, value):
        self.keys[name] = (kind, value)

    def repeat_key(self, name):
        self.again["key"] += text(name) + u32(self.keys[name][0]) + self.keys[name][1]
        self.more["key"] += 1

    def repeat_tensor(self, name):
        self.again["tensor"] += self.describe(name, self.tensors[name], 0)
        self.more["tensor"] += 1

    @staticmethod
    def describe(name, tensor, offset):
        dims = tensor["dims"]
        place = tensor["offset"] if tensor["offset"] is not None else offset
        return (text(name) + u32(len(dims)) + b"".join(u64(size) for size in dims) + u32(tensor["type"]) +
                u64(place))

    def to_bytes(self):
        n_tensors = len(self.tensors) + self.more["tensor"] if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) + self.more["key"] if self.n_keys is None else self.n_keys
        head = b"GGUF" + u32(self.version) + u64(n_tensors) + u64(n_keys)
        head += b"".join(text(name) + u32(kind) + value for name, (kind, value) in self.keys.items())
        head += self.again["key"]
        data = b""
        for name, tensor in self.tensors.items():
            head += self.describe(name, tensor, len(data))
            data += tensor["data"] + bytes(-len(tensor["data"]) % ALIGNMENT)
        head += self.again["tensor"]
        return head + bytes(-len(head) % ALIGNMENT) + data


GGUF_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down"}


def gguf_name(name):
    """blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight."""
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def tiny_gguf(folder):
    """The tiny model as GGUF. Q and K rows stay in HF's order: the weights are random in any order."""
    folder = tiny_chat_model(folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = Gguf()
    model.put("general.architecture", STRING, text("llama"))
    model.put("general.name", STRING, text("tiny"))
    for key, setting in (("block_count", "num_hidden_layers"), ("embedding_length", "hidden_size"),
                         ("feed_forward_length", "intermediate_size"),
                         ("context_length", "max_position_embeddings"),
                         ("attention.head_count", "num_attention_heads"),
                         ("attention.head_count_kv", "num_key_value_heads")):
        model.put("llama." + key, U32, u32(config[setting]))
    model.put("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", config["rms_norm_eps"]))
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    model.put("tokenizer.ggml.model", STRING, text("gpt2"))
    model.put("tokenizer.ggml.pre", STRING, text("gpt-2"))
    for key, entries in (("tokens", tokens), ("merges", merges)):
        model.put("tokenizer.ggml." + key, ARRAY,
                  u32(STRING) + u64(len(entries)) + b"".join(text(entry) for entry in entries))
    model.put("tokenizer.ggml.token_type", ARRAY, u32(U32) + u64(len(tokens)) +
              b"".join(u32(3 if token in special else 1) for token in tokens))
    model.put("tokenizer.ggml.eos_token_id", U32, u32(config["eos_token_id"]))
    model.put("tokenizer.chat_template", STRING, text((folder / "chat_template.jinja").read_text()))
    for name, entry, data in SafeTensors(folder / "model.safetensors").tensors():
        model.tensors[gguf_name(name)] = {"dims": entry["shape"][::-1], "type": BF16, "data": data, "offset": None}
    return model


def sparse_gguf(model, rows, file):
    """Writes a well-formed one-layer model whose feed-forward is `rows` wide, in holes but for its header."""
    model = copy.deepcopy(model)
    model.put("llama.block_count", U32, u32(1))
    model.put("llama.feed_forward_length", U32, u32(rows))
    for name in [name for name in model.tensors if name.startswith("blk.1.")]:
        del model.tensors[name]
    place = 0
    for name, tensor in model.tensors.items():
        if ".ffn_" in name and "norm" not in name:
            width = tensor["dims"][1] if "down" in name else tensor["dims"][0]
            tensor.update(type=Q4_0, dims=[rows, width] if "down" in name else [width, rows])
        tensor.update(data=b"", offset=place)
        values = math.prod(tensor["dims"])
        size = values // 32 * 18 if tensor["type"] == Q4_0 else values * 2
        place += size + -size % ALIGNMENT
    header = model.to_bytes()
    file.write(header)
    file.truncate(len(header) + place)


def changed(model, change):
    """A copy with `change` applied."""
    model = copy.deepcopy(model)
    change(model)
    return model
