"""From prompts that are sorted by context to a bank of concepts that `sl.Do` switches: run, fit from several seeds, measure.

seen/*.safetensors   activations of each context
seed-*/              what the fit of each seed keeps
"""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.card import example, example_of_pictures, front
from ...bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ...bank.concepts import Concept
from ...devices import best_device
from ...encoders import Context
from ...errors import UnsupportedTarget
from ...evaluation.contexts import distances, unidentified
from ...evaluation.report import markdown
from ...graph.causal_graph import CausalGraph, Edge
from ...hosts import digest_of, host_for
from ...steering.recording import observing
from ...text import stage
from ..context_recipe import ContextRecipe
from ..fit.contexts import OBSERVED, ContextFit, ContextLayer, fit_contexts
from ..record.contexts import aligned, last_tokens, paired, pictures, reads_words
from ..record.noised import spans
from ..store import recorded
from .card import described

HELD_OUT = 0.3
"""Share of the activations of each context that a module is not trained on."""


class Pairs(NamedTuple):
    """Activations as observed, and of the same with a concept intervened on."""

    plain: Float[Tensor, "n P D"]
    done: Float[Tensor, "n P D"]

    def learned(self) -> "Pairs":
        """Those that a module is trained on."""
        return Pairs(*(x[: len(x) - held(x)] for x in self))

    def held(self) -> "Pairs":
        """The others."""
        return Pairs(*(x[-held(x) :] for x in self))


class Fitted(NamedTuple):
    """A module; of its concepts one unit each, raw, the ends of 99 % of readings, and total effects `[effect, cause]`, in
    units."""

    module: Context
    unit: Float[Tensor, " K"]
    natural: Float[Tensor, "2 K"]
    effects: Float[Tensor, "K K"]


def train_context(target: Any, tokenizer: Any, recipe: ContextRecipe, folder: Path) -> ConceptBank:
    """A module at the recipe's site, with the concepts and their effects on each other; the model stays as it is."""
    prompts, partners = recipe.read_contexts(), recipe.read_pairs()
    with stage(1, 2, f"running prompts of {len(prompts)} contexts at {recipe.site}"):
        seen = {name: _seen(target, tokenizer, recipe, name, some, folder / "seen") for name, some in prompts.items()}
        plain = {
            name: _seen(target, tokenizer, recipe, f"{name}/observed", [p for _, p in some], folder / "seen")
            for name, some in partners.items()
        }
    observed, pairs = seen.pop(OBSERVED), {}
    words = reads_words(host_for(target), recipe.site)
    for name, done in seen.items():
        before, after = (plain[name], done) if name in plain else paired(observed, done, words=words)
        pairs[name] = Pairs(before, aligned(before, after) if words else after)
    with stage(2, 2, f"fitting a module of {len(pairs)} concepts from {recipe.seeds} seeds"):
        seeds = [replace(recipe.fit, seed=recipe.fit.seed + recipe.seed + n) for n in range(recipe.seeds)]
        learned = {name: some.learned() for name, some in pairs.items()}
        fitted = [fitted_to_pairs(observed, learned, fit, folder / f"seed-{fit.seed}") for fit in seeds]
    unknown = unidentified(observed, {name: seen[name] for name in seen if name not in plain})
    unknown += [name for name in plain if torch.dist(*pairs[name]) <= 1e-3 * pairs[name].plain.norm()]
    bank = _bank(target, recipe, fitted, observed, pairs, unknown)
    bank.provenance, bank.license = recipe.provenance, recipe.license
    return bank.with_concepts(bank.concepts, card=_card(bank, recipe, draws=tokenizer is None))


def held(x: Tensor) -> int:
    """How many activations of a context are held out: the last ones."""
    return max(1, round(HELD_OUT * len(x)))


def _seen(target: Any, tokenizer: Any, recipe: ContextRecipe, name: str, prompts: list[str], folder: Path) -> Tensor:
    """Activations `[n, P, D]` of a context."""

    def run() -> dict[str, Tensor]:
        if tokenizer is not None:
            return {"x": last_tokens(target, tokenizer, prompts[: recipe.samples], recipe.site, recipe.batch)}
        if isinstance(target, torch.nn.Module):
            raise UnsupportedTarget(f"a {type(target).__name__} is not run by prompts; see steerlib/training/README.md")
        target.set_progress_bar_config(disable=True)
        own: Any = {"batch": recipe.batch, "steps": recipe.steps, "seed": recipe.seed}
        drawn_again = not reads_words(host_for(target), recipe.site)  # of words noise changes nothing
        own["count"] = recipe.samples if drawn_again else min(recipe.samples, len(prompts))
        return {"x": pictures(target, prompts, recipe.site, level=recipe.level, **own)}

    return recorded(folder / f"{sha256(name.encode()).hexdigest()[:16]}.safetensors", run)["x"]


def fitted_to(contexts: Mapping[str, Float[Tensor, "n P D"]], settings: ContextFit, folder: Path | None = None) -> Fitted:
    """A module alone on activations of each context, by name; what it does not reconstruct costs what a Gaussian says, of the
    variance that the settings allow for."""
    names = [name for name in contexts if name != OBSERVED]
    every = torch.cat([*contexts.values()])
    middle, size = every.mean(0), float((every - every.mean(0)).square().mean().sqrt().clamp(min=1e-12))
    normal = {name: (x - middle) / size for name, x in contexts.items()}
    positions, width = every.shape[1:]
    layer = ContextLayer(names, width, settings, positions=positions)
    layer.begin({name: x.flatten(1) for name, x in normal.items()})

    def batches(name: str, g: torch.Generator) -> Tensor:
        return normal[name][torch.randint(len(normal[name]), (settings.batch,), generator=g)]

    def cost(x: Tensor) -> Tensor:
        return (x - layer(x)).square().flatten(1).sum(-1).mean() / (2 * settings.error)

    fit_contexts(layer, batches, cost, settings, folder=folder)
    return measured(layer, contexts, middle, size)


def fitted_to_pairs(
    observed: Float[Tensor, "n P D"], pairs: Mapping[str, Pairs], settings: ContextFit, folder: Path | None = None
) -> Fitted:
    """A module that learns what a `Do` of each concept has to change, every position alone; what it leaves costs what a
    Gaussian says, of the variance that the settings allow for."""
    flat = {name: Pairs(*(x.flatten(0, 1) for x in both)) for name, both in pairs.items()}
    every = torch.cat([observed.flatten(0, 1), *(both.done for both in flat.values())])
    middle, size = every.mean(0), float((every - every.mean(0)).square().mean().sqrt().clamp(min=1e-12))
    device = best_device()
    normal = {name: Pairs(*(((x - middle) / size).to(device) for x in both)) for name, both in flat.items()}
    layer = ContextLayer([*pairs], every.shape[-1], settings).to(device)

    def batches(name: str, g: torch.Generator) -> Pairs:
        rows = torch.randint(len(normal[name].plain), (settings.batch,), generator=g)
        return Pairs(*(x[rows] for x in normal[name]))

    def cost(both: Pairs) -> Tensor:
        return (both.done - layer.changed(both.plain)).square().sum(-1).mean() / (2 * settings.error)

    fit_contexts(layer, batches, cost, settings, contexts=[*pairs], folder=folder)
    return measured(layer.cpu(), {OBSERVED: observed, **{name: both.done for name, both in pairs.items()}}, middle, size)


@torch.no_grad()
def measured(
    layer: ContextLayer, contexts: Mapping[str, Float[Tensor, "n P D"]], middle: float | Tensor = 0.0, size: float = 1.0
) -> Fitted:
    """A trained layer as an encoder of activations as they come, with an axis for each concept: along it varies most what the
    concept writes, and it points to where interventions lead."""
    own = {name: tensor.detach().clone() for name, tensor in layer.module.to_tensors().items()}
    at = torch.as_tensor(middle).expand(layer.positions, own["pool"].shape[-1] // layer.positions).flatten()
    own["pool"], own["unpool"] = own["pool"] / size, own["unpool"] * size
    own["pool.bias"] = own["pool.bias"] - own["pool"] @ at
    module = Context(own, layer.positions)
    none = torch.zeros(module.count)
    c = {name: module.concepts(module.pooled(x), none).flatten(0, -3) for name, x in contexts.items()}
    every = torch.cat([*c.values()])
    for k, name in enumerate(layer.concepts):
        axis = _axis(every[:, k], own["unpool"][k])
        away = (c[name][:, k].mean(0) - c[OBSERVED][:, k].mean(0)) @ axis
        own["axis"][k] = axis if away >= 0 else -axis
    own["mean"] = (c[OBSERVED].mean(0) * own["axis"]).sum(-1)
    z = (c[OBSERVED] * own["axis"]).sum(-1) - own["mean"]
    unit = z.std(0).clamp(min=1e-6)
    some = z[:: 1 + len(z) // 100_000]  # of more numbers than 16 million torch takes no quantiles
    ends = torch.quantile(some, torch.tensor([0.005, 0.995]), dim=0)
    return Fitted(Context(own, layer.positions), unit, ends, _effects(own, c[OBSERVED], unit))


def layer_bank(model: torch.nn.Module, contexts: Mapping[str, Any], *, name: str = "contexts") -> ConceptBank:
    """A bank of the context layer in a trained model of one's own, by which `sl.Do` switches it.

    Args:
        model: has one `ContextLayer`; it is called with each batch.
        contexts: by name, a batch of each context, on which readings are measured.
        name: name of the bank.
    """
    path, layer = next((path, part) for path, part in model.named_modules() if isinstance(part, ContextLayer))
    seen: dict[str, Tensor] = {}
    for context, batch in contexts.items():
        keep = lambda x, _: seen.__setitem__(context, x.detach().clone())  # noqa: B023, E731
        with torch.no_grad(), observing(model, {f"{path}.in": keep}):
            model(batch)
    fitted = measured(layer, {name: x.reshape(len(x), layer.positions, -1) for name, x in seen.items()})
    unknown = unidentified(seen[OBSERVED], {name: seen[name] for name in layer.concepts})
    concepts = [_concept(fitted, k, name, path, name in unknown) for k, name in enumerate(layer.concepts)]
    bank = ConceptBank.from_encoder(fitted.module, site=path, reads=f"{path}.in", base=model, name=name, concepts=concepts)
    bank.graph = _graph(list(layer.concepts), [fitted])
    return bank


def _axis(c: Float[Tensor, "n O"], write: Float[Tensor, "O wide"]) -> Float[Tensor, " O"]:
    """What to read of a block so that it is the principal component of what the block writes."""
    values, vectors = torch.linalg.eigh(torch.cov(c.T).reshape(len(write), len(write)))
    root, gram = vectors * values.clamp(min=0).sqrt(), write @ write.T
    axis = gram @ root @ torch.linalg.eigh(root.T @ gram @ root).eigenvectors[:, -1]
    return axis / axis.norm().clamp(min=1e-12)


def _effects(own: Mapping[str, Tensor], c: Float[Tensor, "n K O"], unit: Float[Tensor, " K"]) -> Float[Tensor, "K K"]:
    """In units of both: what concept i reads more per unit of what j brings in itself, as its numbers vary together."""
    a, eye = own["effects"][:, 0], torch.eye(len(unit))
    total = (a * (1 - eye)[:, :, None, None]).permute(1, 2, 0, 3).flatten(0, 1).flatten(1) + torch.eye(c[0].numel())
    e = torch.linalg.solve(total, (c - own["bias"]).flatten(1).T).T.unflatten(1, c.shape[1:])
    e = e - e.mean(0)
    z = (e * own["axis"]).sum(-1)
    along = (e * z[..., None]).sum(0) / z.square().sum(0).clamp(min=1e-12)[:, None]
    raw = torch.einsum("io,jiop,jp->ij", own["axis"], a, along)
    return raw * (1 - eye) * unit / unit[:, None]


def _concept(fitted: Fitted, k: int, name: str, encoder: str, is_unknown: bool, **more: Any) -> Concept:
    """A concept that is switched; of one that was not identified no amount is useful."""
    low, high = fitted.natural[:, k].tolist()
    own: Any = {"beyond": UNKNOWN} if is_unknown else {"useful": 1.0}
    own |= {"index": k, "unit": float(fitted.unit[k]), "natural": (low, high), "useful_as": "Do", "source": "a context module"}
    return Concept(name=name, encoder=encoder, **own, **more)


def _bank(
    target: Any, recipe: ContextRecipe, fitted: list[Fitted], observed: Tensor, pairs: Mapping[str, Pairs], unknown: list[str]
) -> ConceptBank:
    """Concepts with what a `Do` gives on held-out pairs, and the graph of their effects, with intervals over seeds."""
    first, names = fitted[0], [*pairs]
    id = f"{recipe.site}@{recipe.level}" if recipe.level is not None else recipe.site
    concepts = []
    for k, name in enumerate(names):
        about = _given_by(first.module, k, name, pairs[name].held())
        concepts.append(_concept(first, k, name, id, name in unknown, label=name, effects=about))
    site = SiteFacts(width=observed.shape[-1], norm=float(observed.flatten(0, 1).norm(dim=-1).median()))
    host = host_for(target)
    base = BaseModel(id=recipe.base, fingerprint=host.fingerprint(), weights=digest_of(host))
    levels = {} if recipe.level is None else spans(target, [recipe.level])
    made: Any = {"base": base, "sites": {recipe.site: site}, "levels": levels, "graph": _graph(names, fitted)}
    return ConceptBank(recipe.name, concepts, {id: first.module}, **made)


def _given_by(module: Context, k: int, name: str, both: Pairs) -> dict[str, float]:
    """How near a `Do` comes: the share of the squared change that it makes, and distances with it and without."""
    a = torch.zeros(*both.plain.shape[:2], module.count)
    a[..., k] = 1.0
    given = both.plain + module.change(both.plain, a)
    left, whole = (float((x - both.done).square().sum()) for x in (given, both.plain))
    far = distances({name: given}, {name: both.done}, both.plain)
    return {"changed": 1 - left / whole if whole else 0.0, "distance": far.distance[name], "plain": far.plain[name]}


def _graph(names: list[str], fitted: list[Fitted]) -> CausalGraph:
    """Total effects that are not 0; of several seeds with the least and the largest."""
    every = torch.stack([one.effects for one in fitted])
    edges = []
    for j, src in enumerate(names):
        for i, dst in enumerate(names):
            if abs(weight := float(every[0, i, j])) > 1e-3:
                ends = (float(every[:, i, j].min()), float(every[:, i, j].max())) if len(fitted) > 1 else (None, None)
                found: Any = {"tau": weight, "tau_lo": ends[0], "tau_hi": ends[1]}
                edges.append(Edge(src=src, dst=dst, weight=weight, relation="context", evidence="observed", **found))
    return CausalGraph(edges)


def _card(bank: ConceptBank, recipe: ContextRecipe, draws: bool) -> str:
    """The card, in Markdown with model-card metadata."""
    unknown = [c.name for c in bank.concepts.values() if c.beyond == UNKNOWN]
    rows = [
        (c.name, f"{c.effects['changed']:.0%}", f"{c.effects['distance']:.3g}", f"{c.effects['plain']:.3g}")
        for c in bank.concepts.values()
    ]
    effects = [
        (
            e.src,
            e.dst,
            f"{e.weight:+.2f}",
            "–" if e.tau_lo is None or e.tau_hi is None else f"{e.tau_lo:+.2f} to {e.tau_hi:+.2f}",
        )
        for e in bank.graph.edges
    ]
    first = next((name for name in bank.concepts if name not in unknown), next(iter(bank.concepts)))
    shown = recipe.name, recipe.source, f'{{"{first}": sl.Do()}}'
    parts = [
        front(recipe.name, recipe.base, recipe.license, [*bank.concepts.values()]).strip(),
        f"# {recipe.name}\n\n{described(recipe)}".strip(),
        example_of_pictures(*shown, recipe.plain) if draws else example(*shown),
        MEASURED + "\n\n" + markdown("concept | of the change | distance | without Do", rows),
        f"**{', '.join(unknown)}: {UNKNOWN}.**" if unknown else "",
        EFFECTS + "\n\n" + markdown("cause | effect | units per unit | over seeds", effects) if effects else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


UNKNOWN = "not identified, for its context shows nothing at this site that the observed one does not"
"""What is said of such a concept."""
MEASURED = """## What was measured

On held-out pairs of prompts, observed and with the concept: how much of the squared difference of activations at the site
`sl.Do()` makes, and how far they are then from those with the concept (sliced Wasserstein distance), beside observed ones as
they are. What becomes of the output was not measured."""
EFFECTS = """## Effects on each other

Total effects that the module learned, as concepts vary where nothing is intervened on; they are no graph of direct causes."""
