# SPDX-License-Identifier: Apache-2.0
"""The official openai client against dsd: what an application would do, unchanged."""
import unittest

from daemon import Daemon, need

openai = need("openai")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class OpenAiClient(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dsd = cls.enterClassContext(Daemon())
        cls.client = openai.OpenAI(base_url=f"http://{cls.dsd.ready['http']}/v1", api_key="unused",
                                   max_retries=0, timeout=120)

    def chat(self, **options):
        return self.client.chat.completions.create(
            **{"model": "default", "messages": QUESTION, "temperature": 0, "max_tokens": 24, **options})

    def test_chat(self):
        answer = self.chat()
        self.assertIn("Paris", answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        self.assertRegex(answer.system_fingerprint, r"^ds-v1-[0-9a-f]{8}$")
        self.assertEqual(answer.usage.total_tokens,
                         answer.usage.prompt_tokens + answer.usage.completion_tokens)

    def test_stream_is_the_same_text(self):
        whole = self.chat()
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}))
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        self.assertEqual("".join(pieces), whole.choices[0].message.content)
        self.assertGreater(len(pieces), 2)
        self.assertEqual(chunks[-1].usage, whole.usage)
        self.assertEqual({c.id for c in chunks}, {chunks[0].id})
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        self.assertEqual([r for r in reasons if r], [whole.choices[0].finish_reason])

    def test_stop(self):
        answer = self.chat(stop=["Paris"])
        self.assertNotIn("Paris", answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        streamed = "".join(c.choices[0].delta.content or "" for c in self.chat(stop=["Paris"], stream=True)
                           if c.choices)
        self.assertEqual(streamed, answer.choices[0].message.content)

    def test_length(self):
        answer = self.chat(max_tokens=2)
        self.assertEqual(answer.choices[0].finish_reason, "length")
        self.assertEqual(answer.usage.completion_tokens, 2)

    def test_seed_repeats(self):
        first, second = (self.chat(temperature=1.0, seed=7).choices[0].message.content for _ in "ab")
        self.assertEqual(first, second)

    def test_chat_logprobs(self):
        answer = self.chat(logprobs=True, top_logprobs=3)
        entries = answer.choices[0].logprobs.content
        self.assertEqual("".join(e.token for e in entries), answer.choices[0].message.content)
        for entry in entries:
            self.assertEqual(len(entry.top_logprobs), 3)
            self.assertEqual(entry.top_logprobs[0].logprob, entry.logprob)  # greedy took the best
            self.assertLessEqual(entry.logprob, 0)

    def test_embeddings(self):
        # Without encoding_format the client asks for base64 and decodes it itself.
        texts = ["a cat on a mat", "a cat on a rug", "quarterly tax report"]
        reply = self.client.embeddings.create(model="default", input=texts)
        cat, rug, tax = (e.embedding for e in reply.data)
        self.assertEqual(len(cat), 576)
        self.assertAlmostEqual(sum(x * x for x in cat), 1, places=4)
        plain = self.client.embeddings.create(model="default", input=texts[0], encoding_format="float")
        for a, b in zip(cat, plain.data[0].embedding):
            self.assertAlmostEqual(a, b, places=5)

        def dot(a, b):
            return sum(x * y for x, y in zip(a, b))
        self.assertGreater(dot(cat, rug), dot(cat, tax))

    def test_models(self):
        names = [model.id for model in self.client.models.list()]
        self.assertEqual(names[0], "default")
        self.assertIn("v1", names)
        self.assertEqual(self.client.models.retrieve("v1").id, "v1")
        self.assertIn("Paris", self.chat(model="v1").choices[0].message.content)

    def test_completion_scores_a_given_text(self):
        ids = self.dsd.post("/ds/v1/tokenize", {"text": "The capital of France is Paris."})["ids"]
        scored = self.client.completions.create(model="default", prompt=ids, max_tokens=0, echo=True,
                                                logprobs=1, temperature=0)
        logprobs = scored.choices[0].logprobs
        self.assertEqual(scored.choices[0].text, "The capital of France is Paris.")
        self.assertEqual(len(logprobs.token_logprobs), len(ids))
        self.assertIsNone(logprobs.token_logprobs[0])
        self.assertTrue(all(value <= 0 for value in logprobs.token_logprobs[1:]))
        self.assertEqual("".join(logprobs.tokens), "The capital of France is Paris.")

    def test_completion_of_a_text_and_of_its_ids_agree(self):
        text = "Once upon a time"
        ids = self.dsd.post("/ds/v1/tokenize", {"text": text})["ids"]
        answers = [self.client.completions.create(model="default", prompt=prompt, max_tokens=12,
                                                  temperature=0).choices[0].text for prompt in (text, ids)]
        self.assertEqual(answers[0], answers[1])

    def test_errors(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            self.chat(model="no-such-model")
        self.assertIn("no-such-model", caught.exception.message)
        for wrong in ({"temperature": -1}, {"top_p": 2}, {"max_tokens": -5}, {"messages": []},
                      {"messages": [{"role": "wizard", "content": "x"}]}):
            with self.subTest(wrong), self.assertRaises(openai.BadRequestError) as caught:
                self.chat(**wrong)
            self.assertIsInstance(caught.exception.body, dict)
            self.assertIn("message", caught.exception.body)
        with self.assertRaises(openai.NotFoundError):
            self.client.responses.create(model="default", input="x")

    def test_what_is_unknown_is_ignored_and_said(self):
        raw = self.client.chat.completions.with_raw_response.create(
            model="default", messages=QUESTION, max_tokens=1, extra_body={"made_up_option": 1})
        self.assertIn("made_up_option", raw.headers["x-ds-ignored"])


if __name__ == "__main__":
    unittest.main()
