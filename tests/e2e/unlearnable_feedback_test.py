# SPDX-License-Identifier: Apache-2.0
"""Feedback that is well-formed and yet nothing that this model can learn: it is acknowledged, stays out of every
round with the reason as its fate, and neither stops the daemon nor takes the honest items beside it along."""
import tempfile
import unittest

from daemon import Daemon, tiny_chat_model

CONTEXT = 512  # of the tiny model
LONG = "pump " * 1000


def said(role, content):
    return {"role": role, "content": content}


def demonstration(*messages):
    return {"kind": "demonstration", "messages": [*messages]}


HONEST = demonstration(said("user", "When does the north well open?"), said("assistant", "At nine."))
TOO_LONG = f"tokens, at most {CONTEXT - 32} can be learned"


class UnlearnableFeedback(unittest.TestCase):
    def daemon(self, model, data=None):
        return Daemon(model=model, data=data, settings={
            "learn.settle": "1d", "gate.max_drop": 10, "gate.max_kl": 100, "learn.max_steps": 3})

    def check(self, model, cases, honest):
        with self.daemon(model) as dsd:
            ids = [dsd.post("/ds/v1/feedback", record)["id"] for record, _ in cases]
            good = dsd.post("/ds/v1/feedback", honest)["id"]
            outcome = dsd.post("/ds/v1/learn/step", {"wait": True})
            self.assertEqual((outcome["outcome"], outcome["items"]), ("published", [good]), outcome)

            def check_fates():
                for id_, (record, reason) in zip(ids, cases):
                    with self.subTest(reason, record=str(record)[:80]):
                        fate = dsd.get(f"/ds/v1/feedback/{id_}")["fate"][-1]
                        self.assertEqual(fate["state"], "quarantined", fate)
                        self.assertIn(reason, fate["reason"])
                self.assertEqual(dsd.get(f"/ds/v1/feedback/{good}")["fate"][-1]["state"], "served")
            check_fates()
            dsd.kill()
            dsd.start()
            self.assertEqual(dsd.post("/ds/v1/learn/step", {"wait": True})["outcome"], "empty")
            check_fates()

    def test_with_a_template(self):
        with tempfile.TemporaryDirectory() as folder:
            user, answer = said("user", "Which pump?"), said("assistant", "The north pump.")
            self.check(tiny_chat_model(folder), (
                (demonstration(said("user", LONG), answer), TOO_LONG),
                (demonstration(user, said("assistant", LONG)), TOO_LONG),
                ({"kind": "correction", "messages": [said("user", "Which well?")], "rejected": LONG,
                  "correction": "The north well."}, TOO_LONG),
                ({"kind": "preference", "prompt": "Which key?", "chosen": "Anna's.", "rejected": LONG}, TOO_LONG),
                (demonstration(said("tool", "5"), user, answer),
                 'messages[0].role is "tool", expected system, user or assistant'),
                ({"kind": "text", "text": "a"}, "text: 1 tokens, expected at least 2")), HONEST)

    def test_developer_is_system(self):
        with tempfile.TemporaryDirectory() as folder:
            self.check(tiny_chat_model(folder), (), {
                **HONEST, "messages": [said("developer", "Be brief."), *HONEST["messages"]]})

    def test_without_a_template(self):
        with tempfile.TemporaryDirectory() as folder:
            model = tiny_chat_model(folder)
            (model / "chat_template.jinja").unlink()
            self.check(model, (
                (HONEST, "this model has no chat template"),
                ({"kind": "preference", "prompt": "Which key?", "chosen": "Anna's.", "rejected": "None."},
                 "this model has no chat template")),
                {"kind": "text", "text": "The north well opens at nine every day but Sunday."})


if __name__ == "__main__":
    unittest.main()
