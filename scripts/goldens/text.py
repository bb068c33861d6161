"""Golden outputs of the laws for text: small language models with random weights, a bank of directions, every kind of edit."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import transformers
from tiny_models import tiny
from tiny_pipelines import seeded
from torch import Tensor

import steerlib as sl
from steerlib import errors
from steerlib.bank import BaseModel, SiteFacts

Edits = Mapping[str, Any]
Found = Tensor | str | dict[str, Any]
Entry = tuple[str, Callable[[], Found]]
"""The rest of a name, and what computes it."""


def steered(target: Any, act: Callable[[], Any], *sessions: tuple[sl.ConceptBank, Edits], **options: Any) -> Any:
    """What `act` gives inside nested sessions, the first of them outermost."""
    with torch.no_grad(), ExitStack() as stack:
        for bank, edits in sessions:
            stack.enter_context(sl.steer(target, bank, edits, **options))
        return act()


def reported(target: Any, act: Callable[[], Any], bank: sl.ConceptBank, edits: Edits, **options: Any) -> str:
    """The report of a session in which `act` ran."""
    with torch.no_grad(), sl.steer(target, bank, edits, **options) as session:
        act()
    return str(session.report())


# -- small language models -------------------------------------------------------------------------------------


class Text:
    """A small language model, a bank for it, and ways to run it."""

    def __init__(self, family: str = "llama", **config: Any):
        seq2seq = family == "t5"
        auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
        self.model = tiny(family, auto, **{"initializer_range": 0.2} | config).requires_grad_(False)
        self.model.generation_config.eos_token_id, self.model.generation_config.pad_token_id = None, 0
        self.model.generation_config.decoder_start_token_id = 0
        self.prefix = "decoder." if seq2seq else ""
        self.bank = text_bank(self.model, f"{self.prefix}layers.0", f"{self.prefix}layers.1")

    def logits(self, pads: str = "left") -> Tensor:
        """Scores of one bare pass."""
        ids, mask = prompts(pads)
        more = {"decoder_input_ids": prompts("none", seed=1)[0]} if self.prefix else {}
        with torch.no_grad():
            return self.model(ids, attention_mask=mask, **more).logits

    def written(self, pads: str = "left", **options: Any) -> dict[str, Tensor]:
        """Greedy tokens and the scores they were chosen by."""
        ids, mask = prompts(pads)
        given = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | options
        made = self.model.generate(ids, attention_mask=mask, **given)
        return {"ids": made.sequences, "logits": torch.stack(made.logits)}

    def both(self, edits: Edits, **options: Any) -> dict[str, Any]:
        """A bare pass and a generation, steered."""
        acts = {"bare": self.logits, "written": self.written}
        return {name: steered(self.model, act, (self.bank, edits), **options) for name, act in acts.items()}


def prompts(pads: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two rows of tokens, and where they are real: with 3 and 1 pads at the `left` or the `right`, or `none`."""
    ids = torch.randint(3, 100, (2, 9), generator=seeded(seed))
    mask = torch.ones_like(ids)
    if pads == "none":
        return ids[:, :6], mask[:, :6]
    for row, count in enumerate((3, 1)):
        mask[row, slice(0, count) if pads == "left" else slice(-count, None)] = 0
    return ids * mask, mask


def text_bank(model: Any, early: str, late: str, **facts: Any) -> sl.ConceptBank:
    """`topic` and `tone` at an early site, `effect` and `side` at a late one, where `tone` moves too, with a small graph.

    `facts` are added to what is known of `tone`.
    """
    rows = torch.randn(5, 32, generator=seeded(5))
    known = {"unit": 0.5, "parts": (sl.Part(encoder=late, index=0, unit=0.3),)} | facts
    concepts = [
        sl.Concept(name="topic", encoder=early, index=0, unit=0.5, present=0.05),
        sl.Concept(name="tone", encoder=early, index=1, **known),
        sl.Concept(name="effect", encoder=late, index=1, unit=2.0),
        sl.Concept(name="side", encoder=late, index=2),
    ]
    encoders = {early: sl.Directions(rows[:2], torch.tensor([0.01, -0.02])), late: sl.Directions(rows[2:])}
    graph = sl.CausalGraph([sl.Edge(src="tone", dst="effect", weight=0.7), sl.Edge(src="topic", dst="side", weight=-0.4)])
    sites = {early: SiteFacts(width=32, norm=0.5), late: SiteFacts(width=32, norm=0.7)}
    return sl.ConceptBank("golden", concepts, encoders, base=BaseModel.of(model), sites=sites, graph=graph)


MASK = torch.tensor([0.0, 1.0, 0.5, 0, 0, 1, 1, 1, 0.25])
TOKENS: dict[str, Any] = {
    "all": "all",
    "prompt": "prompt",
    "generated": "generated",
    "slice": slice(2, 9),
    "rest": slice(4, None),
}
TEXT: dict[str, Mapping[str, Edits]] = {
    "law 1": {
        "nothing": {}, "zero": {"tone": 0.0}, "add": {"tone": 1.5}, "scale": {"tone": sl.Scale(3.0)},
        "set": {"tone": sl.Set(2.0)}, "ablate": {"topic": sl.Ablate()}, "clamp": {"topic": sl.Clamp(-0.1, 0.1)},
        "by index": {"@early/1": 1.5},
    },
    "law 2": {
        "add raw": {"tone": sl.Add(0.7, unit="raw")}, "set raw": {"topic": sl.Set(0.7, unit="raw")},
        "clamp raw": {"tone": sl.Clamp(-0.05, 0.1, unit="raw")}, "low": {"topic": sl.Clamp(low=0.2)},
        "high": {"topic": sl.Clamp(high=-0.2)},
    },
    "law 3": {
        name: {"tone": sl.Add(2.0, tokens=tokens), "topic": sl.Set(1.0, tokens=tokens)}
        for name, tokens in TOKENS.items()
    } | {
        "mask": {"tone": sl.Add(2.0, mask=MASK)}, "mask a row": {"tone": sl.Set(2.0, mask=torch.stack((MASK, MASK.flip(0))))},
    },
    "law 4": {
        "add": {"tone": [1.5, -1.0]}, "set": {"tone": sl.Set([2.0, 0.0]), "topic": [0.0, 1.0]},
        "scale": {"tone": sl.Scale([2.0, 1.0])}, "clamp": {"tone": sl.Clamp([-0.2, 0.0], [0.1, 0.2])},
    },
    "law 5": {
        "steps": {"tone": sl.Set(2.0, when=sl.Steps(2, 6)), "topic": sl.Ablate()},
        "first steps": {"tone": sl.Add(2.0, when=sl.Steps(0, 2))},
        "ramp": {"tone": sl.Add(2.0, when=sl.Ramp(sl.Steps(0, 6)))},
        "decay": {"tone": sl.Set(2.0, when=sl.Ramp(sl.Steps(2, 5), 1.0, 0.0))},
        "per step": {"tone": sl.Add(2.0, when=sl.PerStep((0.0, 1.0, 0.5, -0.25)))},
        "open steps": {"tone": sl.Add(2.0, when=sl.Steps(3))},
    },
    "law 7": {
        "add and add": {"tone": 1.5, "topic": -0.5}, "add and set": {"tone": 1.5, "topic": sl.Set(1.0)},
        "set and clamp": {"tone": sl.Set(1.0), "topic": sl.Clamp(-0.1, 0.1)},
        "everything": {"tone": sl.Set(1.0), "topic": sl.Ablate(), "effect": sl.Scale(2.0), "side": [1.0, -1.0]},
    },
    "law 9": {
        "above": {"tone": sl.Add(2.0, gate=sl.Gate("topic", above=0.0))},
        "below": {"tone": sl.Set(2.0, gate=sl.Gate("topic", below=0.0))},
        "full": {"tone": sl.Add(2.0, gate=sl.Gate("topic", above=-0.2, full=0.2))},
        "present": {"tone": sl.Set(2.0, gate=sl.Gate("topic"))},
        "later site": {"side": sl.Add([2.0, -1.0], gate=sl.Gate("topic", above=0.0))},
    },
}  # fmt: skip
"""Edits by law; `@early` stands for the name of the early site."""
FAMILIES = ("llama", "gemma2", "t5")


def text_cases(law: str) -> Iterator[Entry]:
    for family in FAMILIES:
        text = Text(family)
        for name, edits in TEXT[law].items():
            edits = {key.replace("@early", f"{text.prefix}layers.0"): edit for key, edit in edits.items()}
            yield f"{family}/{name}", partial(text.both, edits, allow_ood=True)
            if family == "llama":
                yield f"report/{name}", partial(reported, text.model, text.written, text.bank, edits, allow_ood=True)


def sites() -> Iterator[Entry]:
    own = "embed layers.0.in layers.0.attn layers.0.mlp layers.0.mlp.in layers.0.update layers.1.attn.heads.1 norm"
    for family, names in (("llama", own), ("gemma2", own), ("t5", "encoder.layers.0 encoder.norm decoder.layers.1.attn")):
        text = Text(family)
        for site in names.split():
            with sl.record(text.model, [site]) as tape:
                text.logits()
            rows = torch.randn(2, tape[site][0][1].shape[-1], generator=seeded(3))
            bank = sl.ConceptBank.from_directions({"a": rows[0], "b": rows[1]}, site=site, base=text.model)
            edits = {"a": 1.0, "b": sl.Set(0.5)}
            yield f"{family}/{site}", partial(steered, text.model, text.logits, (bank, edits))


def patches() -> Iterator[Entry]:
    for family in FAMILIES:
        text = Text(family)
        with torch.no_grad(), sl.record(text.model, text.bank) as tape:
            text.written("none")
        yield f"{family}/concept", partial(text.both, {"topic": sl.Patch(tape), "effect": sl.Patch(tape)})
        with torch.no_grad(), sl.record(text.model, [f"{text.prefix}layers.0"]) as tape:
            text.written("none")
        yield f"{family}/site", partial(text.both, {"topic": sl.Patch(tape, gate=sl.Gate("topic", above=0.0))})


WAYS: dict[str, dict[str, Any]] = {
    "unpadded": {"pads": "none"}, "no cache": {"use_cache": False}, "static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4}, "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}  # fmt: skip
"""Of generating."""


def ways_to_write() -> Iterator[Entry]:
    text = Text()
    chosen = {f"{law} {name}": TEXT[law][name] for law, names in WRITTEN.items() for name in names}
    for name, edits in chosen.items():
        for way, options in WAYS.items():
            act = partial(text.written, **options)
            yield f"{way}/{name}", partial(steered, text.model, act, (text.bank, edits), allow_ood=True)
        for pads in ("none", "right"):
            act = partial(text.logits, pads)
            yield f"{pads} pads/{name}", partial(steered, text.model, act, (text.bank, edits), allow_ood=True)


WRITTEN = {
    "law 1": ["set"], "law 3": ["generated", "slice", "mask"], "law 4": ["set"], "law 5": ["ramp"], "law 7": ["everything"],
    "law 9": ["full"],
}  # fmt: skip


def guided_text() -> Iterator[Entry]:
    text = Text()
    for branch in ("both", "cond", "uncond"):
        for use_cache in (True, False):
            act = partial(text.written, "none", guidance_scale=1.5, use_cache=use_cache)
            for name, edits in (("add", {"tone": 4.0}), ("rows", {"tone": sl.Set([2.0, -2.0])})):
                options = {"branch": branch, "allow_ood": True}
                yield f"{branch}/{name}, cache {use_cache}", partial(steered, text.model, act, (text.bank, edits), **options)


def nested() -> Iterator[Entry]:
    text = Text()
    other = sl.ConceptBank.from_directions({"own": torch.randn(32, generator=seeded(8))}, site="layers.1", base=text.model)
    inner: dict[str, tuple[sl.ConceptBank, Edits]] = {
        "add to add": (text.bank, {"tone": 0.5, "topic": 2.0}),
        "target": (text.bank, {"topic": sl.Set(1.0), "side": sl.Ablate()}),
        "other bank": (other, {"own": sl.Set([1.0, -1.0])}),
    }  # fmt: skip
    for name, session in inner.items():
        for way, act in (("bare", text.logits), ("written", text.written)):
            yield f"{name}/{way}", partial(steered, text.model, act, (text.bank, {"tone": 1.0}), session, allow_ood=True)


def do() -> Iterator[Entry]:
    cases: dict[str, tuple[Edits, dict[str, Any]]] = {
        "hold": ({"tone": 6.0}, {"do": "hold"}),
        "free": ({"tone": 6.0}, {"do": "hold", "hold": ["side"], "free": ["effect"]}),
        "graph": ({"tone": 6.0, "topic": -1.0}, {"do": "graph"}),
        "cut": ({"tone": 6.0, "effect": sl.Set(0.25)}, {"do": "graph"}),
        "hold rows": ({"topic": sl.Set([2.0, -2.0])}, {"do": "hold"}),
    }  # fmt: skip
    for family in FAMILIES:
        text = Text(family)
        for name, (edits, options) in cases.items():
            if family == "t5" and options["do"] == "hold":  # a twin does not follow an encoder in generate()
                yield (
                    f"{family}/{name}",
                    partial(steered, text.model, text.logits, (text.bank, edits), allow_ood=True, **options),
                )
            else:
                yield f"{family}/{name}", partial(text.both, edits, allow_ood=True, **options)
    graph, names = text.bank.graph, list(text.bank.concepts)
    for fixed in ((), ("effect",)):
        moved = graph.forecast({"tone": 2.0, "topic": 1.0, "effect": 0.5}, fixed=fixed)
        yield f"forecast, {len(fixed)} fixed", lambda moved=moved: torch.tensor([moved.get(name, 0.0) for name in names])


def stored_gates() -> Iterator[Entry]:
    text = Text()
    gates = {"full": sl.Gate("topic", above=-0.2, full=0.2), "present": sl.Gate("topic")}
    edits: dict[str, Edits] = {
        "add": {"tone": 2.0}, "set": {"tone": sl.Set(1.5)}, "open": {"tone": sl.Add(2.0, gate="open")},
        "narrowed": {"tone": sl.Add(2.0, gate=sl.Gate("topic", above=0.05))},
    }  # fmt: skip
    for kind, gate in gates.items():
        text.bank = text_bank(text.model, "layers.0", "layers.1", gate=gate)
        for name, edit in edits.items():
            yield f"{kind}/{name}", partial(text.both, edit, allow_ood=True)


def guard() -> Iterator[Entry]:
    text = Text()
    text.bank = text_bank(text.model, "layers.0", "layers.1", natural=(-0.2, 0.3), range=(-5.0, 5.0), beyond="noise")
    edits: dict[str, Edits] = {
        "add": {"tone": 30.0}, "set": {"tone": sl.Set(9.0)}, "two": {"tone": 30.0, "topic": [1.0, -9.0]},
        "scale": {"tone": sl.Scale(9.0)},
        "match norm": {"tone": sl.Add([1.5, -1.0], match_norm=True)}, "keep norm": {"tone": sl.Add(1.5, keep_norm=True)},
        "removal": {"topic": sl.Ablate()}, "clamp": {"tone": sl.Clamp(low=4.0)},
    }  # fmt: skip
    for name, edit in edits.items():
        for allow in (False, True):
            yield f"{name}, allow {allow}", partial(text.both, edit, allow_ood=allow)
        yield f"report/{name}", partial(reported, text.model, text.logits, text.bank, edit)
    matched = text_bank(text.model, "layers.0", "layers.1", match_norm=True)
    yield "stored match norm", partial(steered, text.model, text.logits, (matched, {"tone": 1.5}), allow_ood=True)


def sockets() -> Iterator[Entry]:
    chosen = {f"{law} {name}": TEXT[law][name] for law in ("law 1", "law 2", "law 3", "law 4", "law 7") for name in TEXT[law]}
    chosen = {name: edits for name, edits in chosen.items() if not {"mask", "index"} & set(name.split())}
    for way in ("attached", "compiled"):
        torch.compiler.reset()
        text = Text()
        steering = sl.attach(text.model, text.bank, allow_ood=True)
        if way == "compiled":
            text.model.compile(backend="aot_eager")
        for name, edits in chosen.items():
            steering.set(edits)
            yield f"{way}/{name}", partial(text.logits, "none")
        steering.clear()
        yield f"{way}/cleared", partial(text.logits, "none")
        steering.detach()
        torch.compiler.reset()


def left_behind() -> Iterator[Entry]:
    text = Text()
    with suppress(ZeroDivisionError), sl.steer(text.model, text.bank, {"tone": 3.0}):
        raise ZeroDivisionError
    yield "after an error", text.logits
    plain = lambda: deepcopy(text.model)(prompts("none")[0]).logits  # noqa: E731
    yield "a copy", lambda: steered(text.model, plain, (text.bank, {"tone": 3.0}), allow_ood=True)


def threads() -> Iterator[Entry]:
    text, found = Text(), {}

    def own(amount: float) -> None:
        found[f"{amount}"] = steered(text.model, text.logits, (text.bank, {"tone": amount}), allow_ood=True)

    def wait(*workers: threading.Thread) -> dict[str, Tensor]:
        found.clear()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return dict(found)

    yield "each its own", lambda: wait(*(threading.Thread(target=own, args=(amount,)) for amount in (1.0, -2.0, 3.0)))
    plain = threading.Thread(target=lambda: found.update(plain=text.logits()))
    yield "a plain one", lambda: steered(text.model, lambda: wait(plain), (text.bank, {"tone": 2.0}), allow_ood=True)


def refusals() -> Iterator[Entry]:
    """Names of the errors."""
    text = Text()
    cases: dict[str, tuple[Edits, dict[str, Any]]] = {
        "window for text": ({"tone": sl.Add(1.0, when=sl.Window(0.0, 0.5))}, {}),
        "hold and beams": ({"tone": 1.0}, {"do": "hold"}),
        "rows": ({"tone": [1.0, 2.0, 3.0]}, {}),
        "gate of a later site": ({"topic": sl.Add(1.0, gate=sl.Gate("side", above=0.0))}, {}),
        "unknown concept": ({"tune": 1.0}, {}),
        "named twice": ({"topic": 1.0, "layers.0/0": 1.0}, {}),
        "hold without do": ({"tone": 1.0}, {"hold": ["side"]}),
        "other model": ({"tone": 1.0}, {}),
    }

    def refused(name: str) -> str:
        (edits, options), act = cases[name], partial(text.written, num_beams=2)
        target = Text("gemma2").model if name == "other model" else text.model
        try:
            steered(target, act, (text.bank, edits), **options)
        except errors.SteerlibError as error:
            return type(error).__name__
        return "not refused"

    for name in cases:
        yield name, partial(refused, name)


def readings() -> Iterator[Entry]:
    for family in FAMILIES:
        text = Text(family)
        for name, source in (("concepts", text.bank), ("sites", list(text.bank.sites))):
            for way, act in (("bare", text.logits), ("written", text.written)):

                def taped(source: Any = source, act: Any = act, text: Text = text) -> Found:
                    edits = {"tone": 1.5, "topic": sl.Set(1.0)}
                    with sl.steer(text.model, text.bank, edits, allow_ood=True), sl.record(text.model, source) as tape:
                        act()
                    return {key: torch.cat([values for _, values in passes], 1) for key, passes in tape.items()}

                yield f"{family}/{name}/{way}", taped


PARTS: list[tuple[str, Callable[[], Iterator[Entry]]]] = [
    *((law, partial(text_cases, law)) for law in TEXT),
    ("law 1/sites", sites), ("law 1/patch", patches), ("law 3/ways", ways_to_write), ("law 6", guided_text),
    ("law 7/sessions", nested), ("law 8", do), ("law 9/stored", stored_gates), ("law 10", guard), ("law 11", sockets),
    ("law 12", left_behind), ("law 13", threads), ("law 14", refusals), ("record", readings),
]  # fmt: skip
"""Beginnings of names, and who makes the entries under them."""
