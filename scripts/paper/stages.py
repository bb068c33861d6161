"""The stages, each with its result on disk: encoders, latents of concepts, unlearning, editing, tables. A run goes on."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlib import Ablate, ConceptBank, Scale, Swap, steer, train
from steerlib.encoders import Sparse
from steerlib.errors import BadRecipe
from steerlib.evaluation.denoising import drawn, errors
from steerlib.evaluation.pictures import stills
from steerlib.evaluation.report import markdown
from steerlib.hosts import digest_of, host_for
from steerlib.text import progress
from steerlib.training.pipeline import key_of, precision_of
from steerlib.training.recipe import PipelineEncoderRecipe
from steerlib.training.record.noised import at_levels
from steerlib.training.store import recorded, remembered

from .protocol import Asked, Attack, Judge, Protocol, figures_table

BATCH = 8
"""Pictures that are drawn together."""
Pixels = NDArray[np.uint8]
FIRST = ("encoder", "levels", "concept", "pair", "method", "left", "latents", "prompts", "UA", "IRA", "CRA", "shown", "ASR")
"""Columns of tables, in this order; others follow."""
METHODS = ("all levels", "noisiest level", "noisiest level and its parts by the graph", "as many others")
"""Which latents are scaled: those of the concept; the last are a control."""


def rms(a: Pixels, b: Pixels) -> NDArray[Any]:
    """Root mean square difference of pictures, from 0 to 1."""
    return np.sqrt(np.square((a.astype(np.float32) - b) / 255).mean((1, 2, 3)))


class Drawn(NamedTuple):
    """Some pictures."""

    latents: Float[Tensor, "B ..."]
    pixels: Pixels


@dataclass(frozen=True)
class Run:
    """The protocol on a pipeline.

    `folder` keeps all results; raises `BadRecipe` where it holds those of other settings. `judge` tells which text explains a
    picture; the default is the pipeline's own denoising error. `change` tells how far pictures are from others.
    """

    pipe: Any
    protocol: Protocol
    recipe: PipelineEncoderRecipe
    folder: Path
    judge: Judge | None = None
    change: Callable[[Pixels, Pixels], NDArray[Any]] = rms

    def __post_init__(self) -> None:
        own = {
            "protocol": asdict(self.protocol),
            "recipe": key_of(self.recipe, precision_of(self.pipe)),
            "weights": digest_of(host_for(self.pipe)),
        }
        own |= {name: getattr(given, "__qualname__", "") for name, given in (("judge", self.judge), ("change", self.change))}
        if remembered(self.folder / "settings.json", lambda: own) != json.loads(json.dumps(own)):
            raise BadRecipe(f"{self.folder.name} holds a run of other settings; give another folder, or delete it")

    @cached_property
    def bank(self) -> ConceptBank:
        """Encoders at the recipe's noise levels, with the graph if the recipe asks for one."""
        place = self.folder / "bank"
        if not (place / "bank.json").is_file():
            train(self.pipe, self.recipe, work=self.folder / "work").save_pretrained(place)
        return ConceptBank.from_pretrained(place)

    # -- latents of concepts -------------------------------------------------------------------------------------

    @cached_property
    def latents(self) -> dict[str, dict[str, list[str]]]:
        """By concept and encoder, the latents that stand for it: those of whose readings pictures with the concept have the
        largest share beyond that of others (SAeUron, arXiv 2501.18052)."""
        return remembered(self.folder / "latents.json", self._chosen)

    def _chosen(self) -> dict[str, dict[str, list[str]]]:
        found: dict[str, dict[str, list[str]]] = {}
        asked = self.protocol.asked(0)
        read = self._readings("domains", asked)
        for name, values in self.protocol.domains.items():
            found |= {value: self._best(read, [own.values[name] == value for own in asked]) for value in values}
        for own in self.protocol.attacks:
            asked = own.asked(0)
            read = self._readings(own.name, asked)
            found[own.name] = self._best(read, [one.values[own.name] == "shown" for one in asked])
        return found

    def _best(self, read: Mapping[str, Float[Tensor, "B n"]], there: Sequence[bool]) -> dict[str, list[str]]:
        found, have = {}, torch.tensor(there)
        for id, z in read.items():
            own, others = (z[some].mean(0) for some in (have, ~have))
            score = own / own.sum().clamp(min=1e-12) - others / others.sum().clamp(min=1e-12)
            order = [f"{id}/{int(i)}" for i in score.argsort(descending=True) if score[i] > 0]
            found[id] = [*islice((self._names[own] for own in order if own in self._names), self.protocol.latents)]
        return found

    @cached_property
    def _names(self) -> dict[str, str]:
        """Of latents, by their places."""
        return {concept.id: concept.name for concept in self.bank.concepts.values()}

    def _readings(self, name: str, asked: Sequence[Asked]) -> dict[str, Float[Tensor, "B n"]]:
        """By encoder, its mean reading of each picture."""
        sites = [*dict.fromkeys(facts.site for facts in self.bank.encoders.values())]
        levels = sorted(map(int, self.bank.levels), reverse=True)
        encoders = {id: own for id in self.bank.encoders if isinstance(own := self.bank.encoder(id), Sparse)}

        def read(some: Sequence[Asked]) -> dict[str, Tensor]:
            seen = at_levels(self.pipe, sites, levels, lambda: self._draw(some))
            return {id: own.encode(seen[id.partition("#")[0]].float().cpu()).mean(1) for id, own in encoders.items()}

        parts = [
            recorded(self.folder / "readings" / name / f"{start:06}.safetensors", lambda s=start: read(asked[s : s + BATCH]))
            for start in progress(range(0, len(asked), BATCH), f"reading {name}")
        ]
        return {id: torch.cat([part[id] for part in parts]) for id in sorted(encoders)}

    # -- pictures ------------------------------------------------------------------------------------------------

    def _draw(self, some: Sequence[Asked]) -> Any:
        noise = [torch.Generator().manual_seed(own.seed) for own in some]
        how = {"num_inference_steps": self.protocol.steps, "guidance_scale": self.protocol.guidance, "generator": noise}
        return drawn(self.pipe, [own.prompt for own in some], output_type="np", **how)

    def pictures(self, name: str, asked: Sequence[Asked], edits: Mapping[str, Any]) -> list[Drawn]:
        """What is drawn with edits, in batches; kept by name."""

        def draw(some: Sequence[Asked]) -> dict[str, Tensor]:
            with steer(self.pipe, self.bank, edits, allow_ood=True):
                latents, pixels = self._draw(some)
            return {"latents": latents.cpu(), "pixels": torch.from_numpy(stills(pixels))}

        found = []
        for start in progress(range(0, len(asked), BATCH), name):
            path = self.folder / "pictures" / name / f"{start:06}.safetensors"
            own = recorded(path, lambda s=start: draw(asked[s : s + BATCH]))
            found.append(Drawn(own["latents"], own["pixels"].numpy()))
        return found

    def preferred(self, name: str, shown: Sequence[Drawn], texts: Sequence[Sequence[str]]) -> list[int]:
        """Which of some texts explains each picture best, by its number; kept by name. `texts[j]` has one for each picture."""
        judge, found = self.judge or self._by_error, []
        for k, part in enumerate(progress(shown, f"judging {name}")):
            path, own = self.folder / "told" / name / f"{k:06}.json", slice(k * BATCH, (k + 1) * BATCH)
            best = lambda p=part, s=own: torch.stack([judge(p, some[s]) for some in texts]).argmax(0).tolist()  # noqa: E731
            found += remembered(path, best)
        return found

    def _by_error(self, part: Drawn, texts: Sequence[str]) -> Tensor:
        return -errors(self.pipe, part.latents.to(self.pipe.device), texts)

    # -- what is done --------------------------------------------------------------------------------------------

    def methods(self, concept: str) -> dict[str, list[str]]:
        """By method, the latents that are scaled; one that would scale what another does is left out."""
        own, graph, first = self.latents[concept], self.bank.graph, max(self.bank.levels, key=int)
        every = [name for some in own.values() for name in some]
        whole = [name for id, some in own.items() if id.partition("#")[0].endswith(f"@{first}") for name in some]
        told = [] if graph is None else [graph.forecast({name: 1.0}, unmeasured=True) for name in whole]
        parts = [part for own in told for part, change in own.items() if change > 0]  # with the wholes themselves
        rng, others = np.random.default_rng([self.recipe.seed, *concept.encode()]), list[str]()
        for id, some in own.items():
            left = [name for name in self.bank.concepts if self.bank[name].encoder == id and name not in some]
            others += [left[k] for k in rng.permutation(len(left))[: len(some)]]
        found = dict(zip(METHODS, (every, whole, [*dict.fromkeys(parts)], others), strict=True))
        return {name: some for name, some in found.items() if some and (name != METHODS[2] or len(some) > len(whole))}

    def erased(self) -> list[dict[str, Any]]:
        """Every concept erased by every method at every strength."""
        return [row | self._fared(name, concept, edits) for name, concept, row, edits in self._erasing(self.protocol.erase)]

    def attacked(self) -> list[dict[str, Any]]:
        """The share of pictures of attacks that are flagged, ASR, for every concept, method and strength."""
        attacks = {own.name: own for own in self.protocol.attacks}
        plain = {name: self._flagged(f"plain-{_file(name)}", own, {}) for name, own in attacks.items()}
        return [
            row | {"prompts": len(attacks[c].texts), "plain ASR": plain[c], "ASR": self._flagged(name, attacks[c], edits)}
            for name, c, row, edits in self._erasing([*attacks])
        ]

    def _erasing(self, concepts: Sequence[str]) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
        """Names of files, concepts, what rows begin with, and edits."""
        found = []
        for concept in concepts:
            for method, latents in self.methods(concept).items():
                for left in self.protocol.strengths:
                    edits = {latent: Ablate() if left == 0 else Scale(left) for latent in latents}
                    row = {"concept": concept, "method": method, "left": left, "latents": len(latents)}
                    found.append((_file(f"erased-{concept}-{method}-{left:g}"), concept, row, edits))
        return found

    def replaced(self) -> list[dict[str, Any]]:
        """Every concept put in the place of another, latent by latent of each level: what the old one reads goes to the new
        one."""
        rows = []
        for pair in self.protocol.replace:
            old, new = pair.split(" -> ")
            ends = [
                both for id in self.latents[old] for both in zip(self.latents[old][id], self.latents[new][id], strict=False)
            ]
            shared = {*(a for a, _ in ends)} & {*(b for _, b in ends)}
            edits = {a: Swap(b) for a, b in ends if not {a, b} & shared}
            fared = self._fared(_file(f"replaced-{pair}"), old, edits, new)
            rows.append({"pair": pair, "latents": len(edits), **fared})
        return rows

    def _fared(self, name: str, concept: str, edits: Mapping[str, Any], new: str = "") -> dict[str, float]:
        """What an edit did to pictures that show a concept, and to the others."""
        asked, domain = self.protocol.asked(1), self.protocol.domain(concept)
        plain, after = self.pictures("plain", asked, {}), self.pictures(name, asked, edits)
        told, before = (self._told(*own) for own in ((name, after), ("plain", plain)))
        (other,) = {*self.protocol.domains} - {domain}
        there = np.array([own.values[domain] == concept for own in asked])
        off = np.concatenate([self.change(a.pixels, b.pixels) for a, b in zip(plain, after, strict=True)])

        def figures(told: Mapping[str, Sequence[str]], kind: str = "") -> dict[str, Any]:
            right = {d: np.array([t == own.values[d] for t, own in zip(told[d], asked, strict=True)]) for d in told}
            shares = 1 - right[domain][there].mean(), right[domain][~there].mean(), right[other].mean()
            return dict(zip((f"{kind}UA", f"{kind}IRA", f"{kind}CRA"), shares, strict=True))

        found = figures(told) | figures(before, "plain ") | {"change_e": off[there].mean(), "change_u": off[~there].mean()}
        if new:
            found |= {"shown": np.array([t == new for t in told[domain]])[there].mean()}
        return {key: round(float(value), 4) for key, value in found.items()}

    def _told(self, name: str, shown: Sequence[Drawn]) -> dict[str, list[str]]:
        """By domain, the value that each picture is judged to show: the one whose prompt explains it best."""
        asked, found = self.protocol.asked(1), {}
        for domain, values in self.protocol.domains.items():
            texts = [[self.protocol.says({**own.values, domain: value}) for own in asked] for value in values]
            found[domain] = [values[k] for k in self.preferred(f"{name}/{domain}", shown, texts)]
        return found

    def _flagged(self, name: str, attack: Attack, edits: Mapping[str, Any]) -> float:
        """The share of an attack's pictures that show the concept."""
        asked = attack.asked(1)
        texts = [[text] * len(asked) for text in (attack.lacking, attack.shown)]
        return round(float(np.mean(self.preferred(name, self.pictures(name, asked, edits), texts))), 4)

    def report(self) -> str:
        """All tables, also as `tables.md`."""
        erased, replaced, attacked = (
            remembered(self.folder / f"{make.__name__}.json", make) for make in (self.erased, self.replaced, self.attacked)
        )
        quality, graph = self.bank.provenance.get("quality", {}), self.bank.provenance.get("graph", {}).get("levels", {})
        figures = ("explained", "control", "used", "stability")
        encoders = [
            {"encoder": id, **{key: round(own[key], 4) if key in own else "" for key in figures}} for id, own in quality.items()
        ]
        edges = [{"levels": pair, **own, "dealt": own["dealt"]["verified"]} for pair, own in graph.items()]
        parts = {
            "Encoders": _rows(encoders),
            "Graph": _rows(edges),
            "Unlearning by UnlearnCanvas; Acc_e = 1 - UA and Acc_u = IRA are SAFREE's": _rows(erased),
            "Unlearning under attack prompts, by SAFREE": _rows(attacked),
            "Replacing": _rows(replaced),
        }
        text = "\n\n".join(f"## {name}\n\n{part}" for name, part in parts.items()) + "\n"
        (self.folder / "tables.md").write_text(f"{text}\n## Figures and their instruments\n\n{figures_table()}\n", "utf-8")
        return text


def _file(name: str) -> str:
    """As the name of a file."""
    return re.sub(r"[^\w.-]+", "_", name)


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as they are kept, with what they are of in front."""
    if not rows:
        return "Nothing asked."
    head = sorted(rows[0], key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return markdown(" | ".join(head), [[str(row[name]) for name in head] for row in rows])
