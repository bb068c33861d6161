"""Golden outputs for images: small pipelines of every family with random weights."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from tiny_pipelines import ALL, PIPELINES, Streams, seeded
from torch import Tensor

import steerlib as sl
from goldens.text import Edits, Entry, reported, steered
from steerlib.bank import BaseModel, SiteFacts


class Pipe:
    """A small pipeline with `a` and `b` at its first site and `c` at its second, if it has one, which `a` moves."""

    def __init__(self, family: str, *names: str):
        self.pipe, tiny = ALL[family].build(), ALL[family]
        own = [f"{site}:image" if isinstance(at, Streams) else site for site, at in tiny.sites.items()]
        first, *later = names or own
        with sl.record(self.pipe, [first, *later]) as tape:
            self.made(guidance=family != "ddpm", output_type="pt" if "vae" in first else "")
        rows = {site: torch.randn(2, tape[site][0][1].shape[-1], generator=seeded(1)) for site in (first, *later[:1])}
        facts: Any = {"unit": 0.5, "natural": (-3.0, 3.0)}
        concepts = [sl.Concept(name=name, encoder=first, index=i, **facts) for i, name in enumerate("ab")]
        concepts += [sl.Concept(name="c", encoder=site, index=0) for site in later[:1]]
        self.bank = sl.ConceptBank(
            "golden", concepts, {site: sl.Directions(x) for site, x in rows.items()}, base=BaseModel.of(self.pipe),
            sites={site: SiteFacts(width=x.shape[1], norm=4.0) for site, x in rows.items()},
            graph=sl.CausalGraph([sl.Edge(src="a", dst="c", weight=0.5)] if later else []),
        )  # fmt: skip

    def made(self, images: int = 1, output_type: str = "", **options: Any) -> Tensor:
        """Latents, or images of families that have none or where `output_type` says so."""
        given = ALL[self.pipe.family].call(self.pipe, **options)
        if images > 1:
            noises = images * options.get("batch", 1)
            given |= {"num_images_per_prompt": images, "generator": [seeded(k) for k in range(noises)]}
        return self.pipe(**given | ({"output_type": output_type} if output_type else {}), return_dict=False)[0]

    def entry(self, edits: Edits, made: Mapping[str, Any] | None = None, **options: Any) -> Callable[[], Tensor]:
        """Latents of two images, steered; `made` goes to the pipeline."""
        act = partial(self.made, **{"batch": 2, **(made or {})})
        return partial(steered, self.pipe, act, (self.bank, edits), **{"allow_ood": True, **options})


IMAGES: dict[str, Edits] = {
    "nothing": {}, "add": {"a": 2.0}, "rows": {"a": [2.0, -1.0], "b": sl.Set([1.0, 0.0])},
    "scale": {"a": sl.Scale(2.0)},
    "targets": {"a": sl.Set(1.5), "b": sl.Clamp(-0.5, 0.5), "c": sl.Ablate()}, "raw": {"a": sl.Add(0.7, unit="raw")},
    "window": {"a": sl.Add(2.0, when=sl.Window(0.2, 0.7))}, "late": {"a": sl.Set(2.0, when=sl.Window(0.5, 1.0))},
    "ramp": {"a": sl.Add(2.0, when=sl.Ramp(sl.Window(0.0, 0.8), 1.0, 0.0))},
    "ramp of steps": {"a": sl.Set(2.0, when=sl.Ramp(sl.Steps(0, 2)))},
    "steps": {"a": sl.Add(2.0, when=sl.Steps(1, 2))}, "per step": {"a": sl.Add(2.0, when=sl.PerStep((1.0, 0.5, 0.0)))},
    "box": {"a": sl.Add(2.0, mask=(0.0, 0.0, 0.5, 1.0))},
    "mask": {"a": sl.Set(2.0, mask=torch.rand(2, 4, 8, generator=seeded(4)))},
    "gate": {"a": sl.Add(2.0, gate=sl.Gate("b", above=0.0))},
    "grown gate": {"b": sl.Set(2.0, gate=sl.Gate("a", above=-1.0, full=1.0))},
    "match norm": {"a": sl.Add(0.5, match_norm=True)},
    "keep norm": {"a": sl.Add(1.5, branch="uncond", keep_norm=True)},
}  # fmt: skip


def pipelines() -> Iterator[Entry]:
    for family in PIPELINES:
        pipe = Pipe(family)
        edits = {"a": sl.Add(2.0, when=sl.Window(0.0, 0.7)), "b": sl.Set(1.0)}
        yield f"families/{family}", pipe.entry(edits, {"guidance": family != "ddpm"})
        yield f"families/{family}, cond", pipe.entry(edits, {"guidance": family != "ddpm"}, branch="cond")
    for family in ("sd1", "flux"):
        pipe = Pipe(family)
        for name, edits in IMAGES.items():
            yield f"{family}/{name}", pipe.entry(edits)
            act = partial(pipe.made, batch=2)
            yield f"{family}/report/{name}", partial(reported, pipe.pipe, act, pipe.bank, edits, allow_ood=True)
        for branch in ("cond", "uncond"):
            yield f"{family}/{branch}", pipe.entry({"a": [2.0, -1.0], "b": sl.Set(1.0)}, branch=branch)
        yield f"{family}/capped", pipe.entry({"a": 20.0, "b": sl.Set(20.0)}, allow_ood=False)
        yield f"{family}/no guidance", pipe.entry({"a": [2.0, -1.0]}, {"guidance": False})
        yield f"{family}/hold", pipe.entry({"a": 3.0}, do="hold")
        if family == "sd1":
            yield f"{family}/images per prompt", pipe.entry({"a": [2.0, -1.0]}, {"images": 2})
        else:  # forecasts go between sites of as many tokens
            yield f"{family}/graph", pipe.entry({"a": 3.0}, do="graph")
        with sl.steer(pipe.pipe, pipe.bank, {"b": 2.0}, allow_ood=True), sl.record(pipe.pipe, pipe.bank) as tape:
            pipe.made(batch=2)
        yield f"{family}/readings", partial(lambda tape: {k: torch.stack([z for _, z in v]) for k, v in tape.items()}, tape)
        yield f"{family}/patch", pipe.entry({"a": sl.Patch(tape)})
    yield "flux/text stream", Pipe("flux", "transformer.transformer_blocks.0:text").entry({"a": 2.0, "b": sl.Set(1.0)})


def pipelines_with_words() -> Iterator[Entry]:
    pipe = Pipe("sd_with_text")
    word = sl.Word("sun", at="unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    for name, edit in (("add", sl.Add(2.0, mask=word)), ("set", sl.Set(2.0, mask=word))):
        yield f"word/{name}", pipe.entry({"a": edit}, {"batch": 1}, branch="cond")
    places = ("vae.decoder.in", "vae.decoder.mid_block", "text_encoder.layers.0")
    for site in places:
        pipe = Pipe("sd_with_text", site)
        edits = {"a": 2.0, "b": sl.Set(1.0)}
        yield f"{site}/all", pipe.entry(edits, {"output_type": "pt"})
        if site != places[-1]:
            yield f"{site}/box", pipe.entry({"a": sl.Add(2.0, mask=(0.0, 0.0, 0.5, 1.0))}, {"output_type": "pt"})


PARTS: list[tuple[str, Callable[[], Iterator[Entry]]]] = [("pipelines", pipelines), ("pipelines/words", pipelines_with_words)]
"""Beginnings of names, and who makes the entries under them."""
