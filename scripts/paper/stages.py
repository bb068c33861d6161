"""The stages, each with its result on disk: encoders, latents of concepts, unlearning, editing, tables. A run goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from paper.protocol import Asked, Judge, Protocol, figures_table, table
from steerlib import Ablate, ConceptBank, Scale, Swap, steer, train
from steerlib.encoders import Sparse
from steerlib.evaluation.denoising import drawn, errors
from steerlib.evaluation.pictures import stills
from steerlib.text import progress
from steerlib.training.recipe import PipelineEncoderRecipe
from steerlib.training.record.noised import at_levels, joined
from steerlib.training.store import recorded, remembered

BATCH = 8
"""Pictures that are drawn together."""


class Drawn(NamedTuple):
    """Some pictures."""

    latents: Float[Tensor, "B ..."]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Run:
    """The protocol on a pipeline.

    `folder` keeps all results. `judge` tells which text explains a picture; the default is the pipeline's own denoising error.
    """

    pipe: Any
    protocol: Protocol
    recipe: PipelineEncoderRecipe
    folder: Path
    judge: Judge | None = None

    @cached_property
    def bank(self) -> ConceptBank:
        """Encoders at the recipe's noise levels, with the graph if the recipe asks for one."""
        place = self.folder / "bank"
        if not (place / "bank.json").is_file():
            train(self.pipe, self.recipe, work=self.folder / "work").save_pretrained(place)
        return ConceptBank.from_pretrained(place)

    @cached_property
    def latents(self) -> dict[str, list[str]]:
        """By concept, the latents of each level that stand for it: those of whose readings pictures with the concept have the
        largest share beyond that of others (SAeUron, arXiv 2501.18052)."""
        return remembered(self.folder / "latents.json", self._chosen)

    def _chosen(self) -> dict[str, list[str]]:
        asked, readings = self.protocol.asked(0), self._readings()
        found: dict[str, list[str]] = {}
        for name, values in self.protocol.domains.items():
            for value in values:
                there = torch.tensor([own.values[name] == value for own in asked])
                found[value] = [latent for id, z in readings.items() for latent in self._best(id, z, there)]
        return found

    def _best(self, id: str, z: Float[Tensor, "B n"], there: Bool[Tensor, " B"]) -> list[str]:
        own, others = (z[some].mean(0) for some in (there, ~there))
        score = own / own.sum().clamp(min=1e-12) - others / others.sum().clamp(min=1e-12)
        known = [f"{id}/{int(i)}" for i in score.argsort(descending=True) if f"{id}/{int(i)}" in self._ids and score[i] > 0]
        return [self._ids[own] for own in known[: self.protocol.latents]]

    @cached_property
    def _ids(self) -> dict[str, str]:
        return {concept.id: concept.name for concept in self.bank.concepts.values()}

    def _readings(self) -> dict[str, Float[Tensor, "B n"]]:
        """By encoder, its mean reading of each picture that latents are chosen on."""
        sites, levels = [facts.site for facts in self.bank.encoders.values()], [int(level) for level in self.bank.levels]
        encoders = {id: own for id in self.bank.encoders if isinstance(own := self.bank.encoder(id), Sparse)}

        def read(some: Sequence[Asked]) -> dict[str, Tensor]:
            seen = at_levels(self.pipe, [*dict.fromkeys(sites)], levels, lambda: self._draw(some))
            return {id: own.encode(seen[id.partition("#")[0]].float().cpu()).mean(1) for id, own in encoders.items()}

        asked = self.protocol.asked(0)
        parts = [
            recorded(self.folder / "readings" / f"{start:06}.safetensors", lambda s=start: read(asked[s : s + BATCH]))
            for start in progress(range(0, len(asked), BATCH), "reading latents")
        ]
        return {id: z.float() for id, z in joined(parts).items()}

    def _draw(self, some: Sequence[Asked], **how: Any) -> Any:
        noise = [torch.Generator().manual_seed(own.seed) for own in some]
        how = {"num_inference_steps": self.protocol.steps, "guidance_scale": self.protocol.guidance, "generator": noise} | how
        return drawn(self.pipe, [own.prompt for own in some], output_type="np", **how)

    def pictures(self, name: str, bank: ConceptBank, edits: Mapping[str, Any]) -> list[Drawn]:
        """The pictures that are measured, drawn with edits; kept by name."""

        def draw(some: Sequence[Asked]) -> dict[str, Tensor]:
            with steer(self.pipe, bank, edits, allow_ood=True):
                latents, pixels = self._draw(some)
            return {"latents": latents.cpu(), "pixels": torch.from_numpy(stills(pixels))}

        asked, found = self.protocol.asked(1), []
        for start in progress(range(0, len(asked), BATCH), name):
            path = self.folder / "pictures" / name / f"{start:06}.safetensors"
            own = recorded(path, lambda s=start: draw(asked[s : s + BATCH]))
            found.append(Drawn(own["latents"], own["pixels"].numpy()))
        return found

    def told(self, name: str, shown: Sequence[Drawn]) -> dict[str, list[str]]:
        """By domain, the value that each picture is judged to show: the text that explains it best."""
        return remembered(self.folder / "told" / f"{name}.json", lambda: self._judged(shown))

    def _judged(self, shown: Sequence[Drawn]) -> dict[str, list[str]]:
        judge, asked = self.judge or self._by_error, self.protocol.asked(1)
        found: dict[str, list[str]] = {name: [] for name in self.protocol.domains}
        for k, part in enumerate(shown):
            some = asked[k * BATCH : (k + 1) * BATCH]
            for domain, values in self.protocol.domains.items():
                texts = [[self.protocol.says({**own.values, domain: value}) for own in some] for value in values]
                best = torch.stack([judge(part, own) for own in texts]).argmax(0)
                found[domain] += [values[int(i)] for i in best]
        return found

    def _by_error(self, part: Drawn, texts: Sequence[str]) -> Tensor:
        return -errors(self.pipe, part.latents.to(self.pipe.device), texts)

    # -- what is done --------------------------------------------------------------------------------------------

    def erased(self) -> list[dict[str, Any]]:
        """Every concept erased by its latents, and by those of the noisiest level with what follows them in the graph, at every
        strength."""
        rows = []
        for concept in self.protocol.erase:
            for method, edits in self.methods(concept).items():
                for strength in self.protocol.strengths:
                    name = f"erased-{concept}-{method}-{strength:g}".replace(" ", "_")
                    own = {latent: Ablate() if strength == 0 else Scale(strength) for latent in edits}
                    rows.append({"concept": concept, "method": method, "strength": strength, **self._fared(name, concept, own)})
        return rows

    def methods(self, concept: str) -> dict[str, list[str]]:
        """By method, the latents that are scaled."""
        every, graph = self.latents[concept], self.bank.graph
        found = {"latents of all levels": every}
        if graph is not None and len(graph):
            first = max(self.bank.levels, key=int)
            whole = [name for name in every if self.bank[name].encoder.partition("#")[0].endswith(f"@{first}")]
            follow = [part for name in whole for part in graph.descendants(name)]
            found["noisiest level and its parts by the graph"] = [*dict.fromkeys([*whole, *follow])]
        return {name: some for name, some in found.items() if some}

    def replaced(self) -> list[dict[str, Any]]:
        """Every concept put in the place of another, latent by latent where both have one: what the old one reads becomes the
        new one's."""
        rows = []
        for pair in self.protocol.replace:
            old, new = pair.split(" -> ")
            ends = [(a, b) for a, b in zip(self.latents[old], self.latents[new], strict=False) if self._together(a, b)]
            taken = {*(b for _, b in ends)}
            edits: dict[str, Any] = {a: Swap(b) for a, b in ends if a not in taken}
            name = f"replaced-{pair}".replace(" ", "_")
            rows.append({"pair": pair, "latents": len(edits), **self._fared(name, old, edits, new)})
        return rows

    def _together(self, a: str, b: str) -> bool:
        return a != b and self.bank[a].encoder == self.bank[b].encoder

    def _fared(self, name: str, concept: str, edits: Mapping[str, Any], new: str = "") -> dict[str, float]:
        """What an edit did to pictures that show a concept, and to the others."""
        plain, after = self.pictures("plain", self.bank, {}), self.pictures(name, self.bank, edits)
        asked, domain = self.protocol.asked(1), self.protocol.domain(concept)
        (other,) = {*self.protocol.domains} - {domain}
        told, before = self.told(name, after), self.told("plain", plain)
        there = np.array([own.values[domain] == concept for own in asked])
        right = {d: np.array([t == own.values[d] for t, own in zip(told[d], asked, strict=True)]) for d in told}
        start = np.array([t == concept for t in before[domain]])[there]
        off = np.concatenate([_apart(a.pixels, b.pixels) for a, b in zip(plain, after, strict=True)])
        found = {"UA": 1 - right[domain][there].mean(), "IRA": right[domain][~there].mean(), "CRA": right[other].mean()}
        found |= {"plain UA": 1 - start.mean(), "change_e": off[there].mean(), "change_u": off[~there].mean()}
        if new:
            found |= {"shown": np.array([t == new for t in told[domain]])[there].mean()}
        return {key: round(float(value), 4) for key, value in found.items()}

    def report(self) -> str:
        """All tables, also as `tables.md`."""
        erased = remembered(self.folder / "erased.json", self.erased)
        replaced = remembered(self.folder / "replaced.json", self.replaced)
        quality = self.bank.provenance.get("quality", {})
        encoders = [
            (id, *(own.get(key, "") for key in ("explained", "control", "used", "stability"))) for id, own in quality.items()
        ]
        graph = self.bank.graph
        parts = {
            "Encoders": table(encoders, ("encoder", "explained", "random dictionary", "used", "stability")),
            "Graph": f"{len(graph)} edges." if graph is not None and len(graph) else "None: the recipe asks for none.",
            "Unlearning (UnlearnCanvas; Acc_e = 1 - UA and Acc_u = IRA are SAFREE's)": _rows(erased),
            "Replacing": _rows(replaced),
            "Figures and their instruments": figures_table(),
        }
        text = "\n\n".join(f"## {name}\n\n{part}" for name, part in parts.items()) + "\n"
        (self.folder / "tables.md").write_text(text, encoding="utf-8")
        return text


def _apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[Any]:
    """Root mean square difference of pictures, from 0 to 1."""
    return np.sqrt(np.square((a.astype(np.float32) - b) / 255).mean((1, 2, 3)))


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    return table([[*row.values()] for row in rows], [*rows[0]]) if rows else "Nothing asked."
