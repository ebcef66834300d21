# SPDX-License-Identifier: Apache-2.0
"""Model files that lie about themselves: dsd ends within seconds, says which file, what it found and what it
expected, and takes no memory beyond what the file has. The data folder of the refused start stays whole."""
import json
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import unittest

from daemon import Daemon, tiny_chat_model
from hostile_models import (ARRAY, F32, STRING, U32, SafeTensors, changed, sparse_gguf, text, tiny_gguf, u32,
                            u64)

MEMORY = 1 << 30  # bytes of address space; the tiny model needs less than half
PATIENCE_S = 30
UP, HF_UP = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"
GGUF_TYPES = "expected F32, F16, BF16, Q8_0, Q4_0 or Q4_1"


class HostileModel(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.data = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def daemon(self, model):
        # In a data folder that has something to lose.
        return Daemon(model=model, data=self.data, memory=MEMORY,
                      settings={"learn.settle": "1d", "serve.threads": 2})

    def teach(self, model):
        """The whole model starts within the same memory; what it holds after the refusals must be the same."""
        with self.daemon(model) as dsd:
            self.answer, _ = dsd.ask("Hello?", max_tokens=8)
            self.item = dsd.post("/ds/v1/feedback", {"kind": "text", "text": "The north well opens at nine."})
            self.store = dsd.get("/ds/v1/feedback-stats")["store"]
            self.assertEqual(dsd.stop(), 0)

    def expect_nothing_lost(self, model):
        with self.daemon(model) as dsd:
            self.assertEqual(dsd.ask("Hello?", max_tokens=8)[0], self.answer)
            stats = dsd.get("/ds/v1/feedback-stats")
            self.assertEqual((stats["store"], stats["last_offset"]), (self.store, self.item["offset"]))
            self.assertEqual(dsd.get(f"/ds/v1/feedback/{self.item['id']}")["record"]["text"],
                             "The north well opens at nine.")
            self.assertTrue(dsd.post("/ds/v1/replay/verify", {})["ok"])

    def expect_refusal(self, model, *words, file=None):
        """`file` is what the message names, the model itself unless given."""
        dsd = self.daemon(model)
        try:
            said = dsd.refusal(PATIENCE_S)
            for word in (f"dsd: {file or model}", *words):
                self.assertIn(word, said)
            self.assertNotIn("terminate called", said)
            self.assertLess(len(said), 2000)
            self.assertFalse((dsd.run / "ready.json").exists())
        except subprocess.TimeoutExpired:
            self.fail(f"dsd neither serves nor ends:\n{dsd.log_text()}")
        finally:
            dsd.__exit__(None)


class HostileGguf(HostileModel):
    def setUp(self):
        super().setUp()
        self.base = tiny_gguf(self.folder)
        self.good = self.folder / "tiny.gguf"
        self.good.write_bytes(self.base.to_bytes())
        self.file = self.folder / "hostile.gguf"

    def refuse(self, change, *words):
        self.file.write_bytes(changed(self.base, change).to_bytes())
        with self.subTest(words[0]):
            self.expect_refusal(self.file, *words)

    def refuse_key(self, name, kind, value, *words):
        self.refuse(lambda model: model.put(name, kind, value), *words)

    def refuse_tensor(self, *words, **fields):
        self.refuse(lambda model: model.tensors[UP].update(fields), *words)

    def test_counts_and_lengths(self):
        self.teach(self.good)
        self.refuse(lambda model: setattr(model, "n_tensors", 1 << 60),
                    f"number of tensors at byte 8 is {1 << 60}", "bytes are left and each needs")
        self.refuse(lambda model: setattr(model, "n_tensors", 8000), "name of tensor 20 at byte")
        self.refuse(lambda model: setattr(model, "n_keys", (1 << 64) - 1),
                    f"number of metadata keys at byte 16 is {(1 << 64) - 1}", "bytes are left")
        self.refuse_key("x", STRING, u64(1 << 63), "x: string at byte", f"needs {1 << 63} bytes", "are left")
        self.refuse_key("x", ARRAY, u32(U32) + u64(1 << 62), f"is {1 << 62}", "x: array length", "are left")
        self.refuse_key("x", ARRAY, u32(STRING) + u64(1) + u64(1 << 63), "x: string 0", f"needs {1 << 63}")
        self.refuse_key("x", ARRAY, u32(ARRAY) + u64(1) + u32(U32) + u64(1) + u32(1),
                        "x: arrays of arrays", "expected an array of numbers")
        self.refuse_key("x", 77, u32(1), "x: value type 77 at byte", "expected 0 to 12")
        self.refuse(lambda model: model.repeat_key("general.name"), "duplicate metadata key general.name")
        self.refuse(lambda model: setattr(model, "version", 9), "GGUF version 9, expected 2 or 3")
        self.expect_nothing_lost(self.good)

    def test_tensors(self):
        self.teach(self.good)
        data_bytes = sum(len(tensor["data"]) for tensor in self.base.tensors.values())
        for offset in (1 << 40, (1 << 63) - 32, (1 << 64) - 32):
            self.refuse_tensor(f"{UP}: 20480 bytes at offset {offset}, the file has {data_bytes}", offset=offset)
        self.refuse_tensor(f"{UP}: offset 16, expected a multiple of the alignment 32", offset=16)
        self.refuse_tensor("at offset 0 overlaps", UP, "which ends at", offset=0)
        self.refuse_tensor(f"{UP}: dimension 1 is {1 << 32}", "must fit 57 bits", dims=[1 << 32, 1 << 32])
        self.refuse_tensor(f"{UP}: dimension 0 is {1 << 62}", dims=[1 << 62, 4])  # 2^64 elements: 0
        self.refuse_tensor(f"{UP}: dimension 1 is 0", dims=[64, 0])
        self.refuse_tensor(f"{UP}: 5 dimensions", "expected 1 to 4", dims=[64, 160, 1, 1, 1])
        self.refuse_tensor(f"{UP}: type id 77", GGUF_TYPES, type=77)
        self.refuse_tensor(f"{UP}: type Q4_K", GGUF_TYPES, type=12)
        self.refuse_tensor(f"{UP}: 159 rows, the model wants 160", dims=[64, 159])
        self.refuse_tensor(f"{UP}: 63 columns, the model wants 64", dims=[63, 160])
        self.refuse_tensor(f"{UP}: shape [10240], the model wants [160, 64]", dims=[64 * 160])
        self.refuse(lambda model: model.repeat_tensor(UP), f"duplicate tensor {UP}")
        self.refuse(lambda model: model.tensors.pop(UP), f"tensor {UP} is missing, expected [160, 64]")
        self.expect_nothing_lost(self.good)

    def test_settings_of_the_model(self):
        self.teach(self.good)
        for alignment in (0, 3):
            self.refuse_key("general.alignment", U32, u32(alignment),
                            f"general.alignment is {alignment}, expected a power of two")
        self.refuse_key("general.architecture", STRING, text("gpt9"),
                        'general.architecture "gpt9", expected "llama"')
        self.refuse_key("tokenizer.ggml.model", STRING, text("spm"),
                        'tokenizer.ggml.model "spm", expected "gpt2"')
        self.refuse_key("tokenizer.ggml.pre", STRING, text("klingon"),
                        'pre-tokenizer "klingon", expected "smollm" or "gpt-2"')
        self.refuse_key("tokenizer.ggml.merges", ARRAY, u32(STRING) + u64(1) + text("zz qq"),
                        'merge 0 "zz qq": token "zz" is not in the vocabulary')
        self.refuse_key("tokenizer.ggml.eos_token_id", U32, u32(640), "eos_token_id is 640", "has 640 tokens")
        self.refuse_key("tokenizer.chat_template", STRING, text("{{ bogus }}"),
                        'chat template "{{ bogus }}', "expected ChatML")
        self.refuse_key("llama.block_count", U32, u32(16384), "llama.block_count is 16384", "20 tensors")
        self.refuse_key("llama.attention.head_count", U32, u32(0), "attention heads is 0", "expected 1 to")
        self.refuse_key("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", float("nan")),
                        "norm epsilon is nan", "expected a positive number")
        self.refuse(lambda model: model.keys.pop("llama.block_count"),
                    "metadata key llama.block_count is missing, expected an integer")
        self.expect_nothing_lost(self.good)

    def test_memory(self):
        # Holes: they cost no disk. The file itself is too large, then what is made of it.
        self.file.write_bytes(self.base.to_bytes())
        os.truncate(self.file, 3 * MEMORY)
        self.expect_refusal(self.file, f"no memory for its {3 * MEMORY} bytes")
        with self.file.open("wb") as file:
            sparse_gguf(self.base, rows=MEMORY // (64 * 4), file=file)
        self.assertLess(self.file.stat().st_size, MEMORY // 2)
        self.expect_refusal(self.file, "not enough memory for this model")

    def test_a_context_without_end_costs_nothing(self):
        endless = changed(self.base, lambda model: model.put("llama.context_length", U32, u32((1 << 31) - 1)))
        self.file.write_bytes(endless.to_bytes())
        with Daemon(model=self.file, memory=2 * MEMORY) as dsd:  # a row per token would take 128 GB
            self.assertEqual(dsd.ask("Hello?", max_tokens=8)[1]["usage"]["completion_tokens"], 8)


class HostileFolder(HostileModel):
    def setUp(self):
        super().setUp()
        self.good, self.model = self.folder / "good", self.folder / "hostile"
        self.good.mkdir()
        tiny_chat_model(self.good)

    def refuse(self, change, *words, file):
        shutil.rmtree(self.model, ignore_errors=True)
        shutil.copytree(self.good, self.model)
        change()
        with self.subTest(words[0]):
            self.expect_refusal(self.model, *words, file=self.model / file if file else None)

    def refuse_json(self, file, change, *words, named=None):
        def rewrite():
            path = self.model / file
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        self.refuse(rewrite, *words, file=file if named is None else named)

    def refuse_weights(self, change, *words, file="model.safetensors"):
        def rewrite():
            weights = SafeTensors(self.model / "model.safetensors")
            change(weights)
            weights.write(self.model / "model.safetensors")
        self.refuse(rewrite, *words, file=file)

    def refuse_tensor(self, fields, *words, file="model.safetensors"):
        self.refuse_weights(lambda weights: weights.header[HF_UP].update(fields), *words, file=file)

    def test_config(self):
        self.teach(self.good)
        for content, *words in (('{"model_type": llama}', "JSON at byte 16", "invalid literal"),
                                ("", "JSON at byte 1", "unexpected end of input"),
                                ("[]", 'looking for "model_type" in array, expected an object'),
                                ("[" * 1_000_000, "nested deeper than 64 levels"),
                                ("{}", '"model_type" is missing, expected a string')):
            self.refuse(lambda content=content: (self.model / "config.json").write_text(content), *words,
                        file="config.json")
        self.refuse((lambda: (self.model / "config.json").unlink()), "is missing", file="config.json")

        def refuse_setting(name, value, *words, named=None):
            self.refuse_json("config.json", lambda config: config.update({name: value}), *words, named=named)
        refuse_setting("model_type", "gpt9", 'model_type "gpt9", expected "llama"')
        refuse_setting("hidden_act", "gelu", 'hidden_act "gelu", expected "silu"')
        refuse_setting("num_hidden_layers", "2", '"num_hidden_layers" is string, expected an integer')
        refuse_setting("num_hidden_layers", 16384, "num_hidden_layers is 16384", "has 20 tensors", named="")
        refuse_setting("vocab_size", 1 << 24, "640 rows, the model wants 16777216", named="")
        refuse_setting("rope_parameters", {"rope_type": "yarn"},
                       'rope_type "yarn", expected default, linear or llama3')
        refuse_setting("quantization_config", {"bits": 4}, "quantization_config is given, expected")
        self.expect_nothing_lost(self.good)

    def test_weights(self):
        self.teach(self.good)
        for length in (1 << 40, (1 << 64) - 1, 99_000_000):
            self.refuse_weights(lambda weights, length=length: setattr(weights, "header_bytes", length),
                                f"header of {length} bytes", "are left")
        self.refuse_tensor({"dtype": "F8_E4M3", "shape": [160, 128]},
                           f"{HF_UP}: dtype F8_E4M3, expected F32, F16 or BF16")
        self.refuse_tensor({"dtype": "Q77"}, HF_UP, 'dtype "Q77", expected F32, F16, BF16')

        def overlap(weights):
            begin, end = weights.header[HF_UP]["data_offsets"]
            weights.header[HF_UP]["data_offsets"] = [begin - 64, end - 64]
        self.refuse_weights(overlap, HF_UP, "begins at byte 122944 of the data, expected 123008")
        self.refuse_tensor({"data_offsets": [1 << 40, (1 << 40) + 20480]}, HF_UP,
                           f"data_offsets [{1 << 40},{(1 << 40) + 20480}] outside the 254592 bytes of data")
        self.refuse_tensor({"shape": [1 << 40, 1 << 40]}, HF_UP, "overflows 64 bits")
        self.refuse_tensor({"shape": [80, 128]}, f"{HF_UP}: 80 rows, the model wants 160", file="")
        self.refuse_weights(lambda weights: weights.header.update(other=weights.header.pop(HF_UP)),
                            f"tensor {HF_UP} is missing, expected [160, 64]", file="")
        self.refuse((lambda: (self.model / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../../elsewhere.safetensors"}}')),
            'a is in "../../elsewhere.safetensors", expected the name of a .safetensors file in this folder',
            file="model.safetensors.index.json")

        def pipe():
            (self.model / "model.safetensors").unlink()
            os.mkfifo(self.model / "model.safetensors")
        self.refuse(pipe, "not a regular file", file="model.safetensors")
        self.expect_nothing_lost(self.good)

    def test_tokenizer(self):
        self.teach(self.good)
        for change, *words in (
                (lambda content: content.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace",
                 "tokenizer.json: pre_tokenizer", "expected Sequence[Digits"),
                (lambda content: content["model"].update(type="Unigram"),
                 "tokenizer.json: model Unigram, expected BPE"),
                (lambda content: content["added_tokens"][0].update(id=1 << 40),
                 f'token "<|endoftext|>" has id {1 << 40}, expected 0 to 639'),
                (lambda content: content["model"]["merges"].append("zz qq"),
                 'merge 381 "zz qq": token "zz" is not in the vocabulary')):
            self.refuse_json("tokenizer.json", change, *words, named="")
        self.refuse((lambda: (self.model / "tokenizer.json").write_text("{")), "JSON at byte 2",
                    file="tokenizer.json")
        self.refuse((lambda: (self.model / "chat_template.jinja").write_text("{{ bogus }}")),
                    'chat template "{{ bogus }}', "expected ChatML", file="")
        self.expect_nothing_lost(self.good)


if __name__ == "__main__":
    unittest.main()
