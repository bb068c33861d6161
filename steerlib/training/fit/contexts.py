"""Train a context module on data that is sorted by which concept was intervened on (Markham et al. 2025, 2507.04754).

Every batch is of one context: observed, or one concept intervened on. What an input costs in it is

    -log p(x | m(z; a)) + beta KL(z | N(0, I)),   z = mu + sigma eps,   mu = pool x

so noise has one distribution in every context, and what differs between contexts has to be in the weights that are switched.
In the context of concept k its own noise is read by a second row of pool: intervened on it no longer depends on its causes, so
it is another function of x. This row is ours, in place of the paper's deep encoder, and is not kept: a `Do` acts on what was
observed.

In a model that stays as it is a module can learn that act itself. x is observed, y the same with concept k intervened on:

    -log p(y | x + m(z; do k) - m(z; 0)) + beta KL(z | N(0, I)),   z = mu + sigma eps,   mu = pool x

A batch of one context alone does not say which noise an observed input would have had in it: where what an intervention sets
is always the same, the noise of its concept is free to tell of other things there, and a `Do` then changes them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from json import dumps, loads
from math import cos, pi
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from ...encoders import Context
from ...encoders.context import LAYERS, read
from ...errors import BadRecipe
from ...text import progress
from ..store import save

OBSERVED = "observed"
"""The name of the context in which nothing was intervened on."""
CHECKPOINT = "context.safetensors"


@dataclass(frozen=True, kw_only=True)
class ContextFit:
    """How a context module is trained; the defaults are the paper's, but for the steps, of which it has as many as epochs need.

    Args:
        inner: I, numbers of a concept's noise.
        outer: O, numbers of a concept.
        depth: Expressive layers, whose widths go from I to O in a line; 0 is a linear module, as a control, with I = O.
        steps: Batches.
        batch: Inputs of each.
        rate: Adam's, after `warmup` steps; from there it falls along a cosine to a hundredth.
        warmup: Steps in which the rate rises in a line.
        beta: The price of what noise says.
        error: Of a module that is trained alone: the variance that it may leave, as a share of that of activations. More of it
            is not worth a number of noise.
        sparse: The price of the length of each block of effects; together with `small`, the price of that of all.
        small: The same of all effects together.
        seed: Of all random choices.
    """

    inner: int = 32
    outer: int = 8
    depth: int = 1
    steps: int = 2000
    batch: int = 512
    rate: float = 1e-3
    warmup: int = 200
    beta: float = 1.0
    error: float = 0.02
    sparse: float = 0.0
    small: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work."""
        if min(self.inner, self.outer) < 2 or min(self.steps, self.batch) < 1 or not 0 <= self.depth <= len(LAYERS):
            raise BadRecipe(f"expected widths from 2 up, positive steps and batch, at most {len(LAYERS)} layers, got {self}")
        if self.depth == 0 and self.inner != self.outer:
            raise BadRecipe(f"expected inner and outer alike in a linear module, of depth 0, got {self.inner} and {self.outer}")
        if min(self.rate, self.error) <= 0 or min(self.warmup, self.beta, self.sparse, self.small) < 0:
            raise BadRecipe(f"expected a positive rate and error, and no negative warmup or prices, got {self}")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * (0.01 + 0.99 * (1 + cos(pi * (step - self.warmup) / max(1, self.steps - self.warmup))) / 2)


class ContextLayer(nn.Module):
    """A context module as a layer, `x[*, P, D]` to `m(x; a)` of the same shape, in a model of your own or alone.

    Outside of `within` nothing is intervened on, and in `eval` mode noise is what is read, without a draw.

    Args:
        concepts: names of contexts other than the observed one.
        width: D.
        settings: widths and seed.
        positions: P.

    >>> layer = ContextLayer(["night"], 6, ContextFit(inner=2, outer=2)).eval()
    >>> with layer.within("night"):
    ...     layer(torch.zeros(3, 6)).shape
    torch.Size([3, 6])
    """

    pool: Tensor
    pool_bias: Tensor
    pool_own: Tensor
    pool_own_bias: Tensor
    noise: Tensor
    noise_bias: Tensor
    effects: Tensor
    unpool: Tensor
    unpool_bias: Tensor
    spread: Tensor

    def __init__(self, concepts: Sequence[str], width: int, settings: ContextFit, *, positions: int = 1):
        super().__init__()
        settings.check()
        self.concepts, self.doing, self.drawn = tuple(concepts), None, torch.Generator()
        g, n, wide = torch.Generator().manual_seed(settings.seed), len(concepts), positions * width
        wider, depth = settings.outer - settings.inner, settings.depth
        sizes = [round(settings.inner + wider * k / max(1, depth)) for k in range(depth + 1)]
        made = _begun(g, n, sizes, wide)
        made |= {"pool.own": made["pool"].clone(), "pool.own.bias": torch.zeros(n, sizes[0])}
        made |= {"spread": torch.full((n, sizes[0]), -1.0), "unpool.bias": torch.zeros(positions, width)}
        for name, tensor in made.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor, requires_grad=name not in ("axis", "mean")))
        self.positions, self.depth, self.kl = positions, depth, torch.zeros(())

    @cached_property
    def module(self) -> Context:
        """What it computes, with the parameters themselves."""
        found = {name: getattr(self, name.replace(".", "_"), None) for name in Context.tensors}
        return Context({name: tensor for name, tensor in found.items() if tensor is not None}, self.positions)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("module", None)  # moved parameters may be others
        return super()._apply(*args, **kwargs)

    @contextmanager
    def within(self, context: str | Mapping[str, float] | None) -> Iterator[None]:
        """Inside the block, intervene on a concept, or on several as far as numbers from 0 to 1 say."""
        amounts = {context: 1.0} if isinstance(context, str) else dict(context or {})
        before, self.doing = self.doing, {self.concepts.index(name): a for name, a in amounts.items() if name != OBSERVED}
        try:
            yield
        finally:
            self.doing = before

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        module = self.module
        z = module.pooled(x)
        if self.training:
            own = read(x, self.pool_own, self.pool_own_bias, self.positions)
            z = self._noisy(torch.where(self._done[:, None] > 0, own, z))
        return self._written(module, z)

    def changed(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """What `Do` makes of activations: `x + m(x; a) - m(x; 0)`."""
        module = self.module
        z = self._noisy(module.pooled(x)) if self.training else module.pooled(x)
        moved = module.concepts(z, self._done) - module.concepts(z, torch.zeros_like(self._done))
        return x + module.unpooled(moved)

    @torch.no_grad()
    def draws(self, n: int, g: torch.Generator) -> Tensor:
        """Activations from noise alone, `[n, D]`, or `[n, P, D]` of several positions that are read together."""
        places = (n,) if self.positions == 1 else (n, 1)
        noise = torch.randn(*places, *self.spread.shape, generator=g)
        return self._written(self.module, noise.to(self.spread.device))

    @property
    def _done(self) -> Float[Tensor, " K"]:
        """How far each concept is intervened on here."""
        return torch.tensor([(self.doing or {}).get(k, 0.0) for k in range(len(self.concepts))], device=self.spread.device)

    def _written(self, module: Context, z: Tensor) -> Tensor:
        """m of noise."""
        return module.unpooled(module.concepts(z, self._done)) + self.unpool_bias.squeeze(0)

    def _noisy(self, mu: Tensor) -> Tensor:
        """Draws of noise; what it says is kept in `kl`, a sum over concepts, a mean over inputs."""
        sigma = self.spread.exp()
        told = (mu.square() + sigma.square() - 1) / 2 - self.spread
        self.kl = told.flatten(-2).sum(-1).mean()
        return mu + sigma * torch.randn(mu.shape, generator=self.drawn).to(mu.device)

    @torch.no_grad()
    def begin(self, contexts: Mapping[str, Float[Tensor, "n wide"]]) -> None:
        """Start from the linear module that explains mean and covariance of each context, of activations `[n, P D]` by name."""
        observed, others = contexts[OBSERVED], [contexts[name] for name in self.concepts]
        middle, (w, write, effects) = observed.mean(0), _linear(observed, others)
        scale = _scales(effects)
        effects, write = effects * scale[:, None] / scale, write / scale[:, None]
        self.unpool.mul_(0.1)[:, 1] = 0.0
        for rows in (self.pool, self.pool_own):
            rows.mul_(0.1)
        self.spread[:, 0], self.spread[:, 1:] = -2.5, -0.1  # the first number tells much, the others hardly anything yet
        for k, x in enumerate(others):
            z = (x - middle) @ w[k]
            at, own = z.mean(), z.std().clamp(min=1e-3)
            self.pool[k, 0], self.pool_bias[k, 0] = w[k], -middle @ w[k]
            self.pool_own[k, 0], self.pool_own_bias[k, 0] = w[k] / own, -(x.mean(0) @ w[k]) / own
            first = 1.0 if self.depth else scale[k]  # else the last layer scales
            for s, (by, shift) in enumerate(((first, 0.0), (first * own, first * at))):
                self.noise[k, s, :2], self.noise_bias[k, s, :2] = 0.0, torch.tensor([shift, -shift])
                self.noise[k, s, :2, 0] = torch.tensor([by, -by])  # of which gelu(t) - gelu(-t) = t
            self.unpool[k, 0] = write[k]
            self.effects[:, :, k, 0, 0], self.effects[:, :, k, 0, 1] = (sign * effects[k, :, None] for sign in (1, -1))
        self.unpool_bias.copy_(middle.unflatten(0, self.unpool_bias.shape))
        for layer in range(self.depth):
            pairs = getattr(self, f"expressive_{layer}")
            pairs[:, :2] = 0.0
            sums = scale[:, None, None] * w.new_tensor([[1.0, -1.0], [-1.0, 1.0]])
            pairs[:, :2, :2] = sums if layer == self.depth - 1 else torch.eye(2)
        self.clamp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Effects from 0 to 1, and the identity of each concept on itself."""
        self.effects.clamp_(0, 1)
        for k in range(len(self.concepts)):
            self.effects[k, :, k] = torch.eye(self.effects.shape[-1])


def _price(effects: Float[Tensor, "K 2 K O O"], settings: ContextFit) -> Tensor:
    """Of the lengths of blocks, and of that of all, those of concepts on themselves left out."""
    off = 1 - torch.eye(len(effects), device=effects.device)
    squares = (effects * off[:, None, :, None, None]).square().sum((-2, -1))
    return settings.sparse * (squares + 1e-12).sqrt().sum() + settings.small * (squares.sum() + 1e-12).sqrt()


def _linear(observed: Float[Tensor, "n wide"], others: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The linear module of contexts: what reads noise, `[K, wide]`, what concepts write, `[K, wide]`, and effects `[K, K]`.

    Intervened on, a concept receives nothing; all else is as it was. So, where noise moves x along lines:

        w_k    reads how far x is moved along the shift of context k, and along that of no other: noise of concept k
        g_j    what x gains per unit of that of j, observed; g_j^i in the context of i, where what i receives is cut
        A_ij unpool_i = g_j - g_j^i          unpool_j = g_j - sum_i A_ij unpool_i
    """
    middle = observed.mean(0)
    w = torch.linalg.pinv(torch.stack([x.mean(0) - middle for x in others]), rtol=0.05).T
    spread = ((observed - middle) @ w.T).std(0)
    w = torch.where(spread > 0.02 * spread.max(), w.T / spread, 0.0).T  # a context like the observed one shows nothing
    gains = _gains(observed, w)
    cut = w.new_zeros(len(w), *w.shape)  # [effect, cause, wide]
    for i, x in enumerate(others):
        rest = [j for j in range(len(w)) if j != i]  # with what i is set to, x would be known whatever it receives
        cut[i, rest] = gains[rest] - _gains(x, w[rest])
    write = gains - cut.sum(0)
    return w, write, (cut * write[:, None]).sum(-1) / write.square().sum(-1).clamp(min=1e-12)[:, None]


def _gains(x: Float[Tensor, "n wide"], w: Float[Tensor, "K wide"]) -> Float[Tensor, "K wide"]:
    """What x gains with each of these readings, the others as they are."""
    x = x - x.mean(0)
    z = x @ w.T
    return torch.linalg.pinv(z.T @ z) @ z.T @ x


def _scales(effects: Float[Tensor, "K K"]) -> Float[Tensor, " K"]:
    """By what concepts are multiplied so that no effect of one on another is more than 1, where they have an order."""
    scale = effects.new_ones(len(effects))
    for _ in effects:
        scale = (scale / effects.abs().clamp(min=1e-6)).amin(1).clamp(max=1)
    return scale


def _begun(g: torch.Generator, n: int, sizes: Sequence[int], wide: int) -> dict[str, Tensor]:
    """First values: blocks at random, effects 0."""

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    inner, outer = sizes[0], sizes[-1]
    noise = some(n, 1, inner, inner).repeat(1, 2, 1, 1)
    own = torch.eye(n)[:, None, :, None, None] * torch.eye(outer)
    made = {"pool": some(n, inner, wide), "pool.bias": torch.zeros(n, inner), "noise": noise}
    made |= {"noise.bias": torch.zeros(n, 2, inner), "effects": own.repeat(1, 2, 1, 1, 1), "bias": torch.zeros(n, outer)}
    for layer, pair in enumerate(zip(sizes, sizes[1:], strict=False)):
        made |= {f"expressive.{layer}": some(n, *pair[::-1]), f"expressive.{layer}.bias": torch.zeros(n, pair[1])}
    made["unpool"] = torch.randn(n, outer, wide, generator=g) / (n * outer) ** 0.5
    return made | {"axis": torch.ones(n, outer) / outer, "mean": torch.zeros(n)}


# -- the loop --------------------------------------------------------------------------------------------------------

Batches = Callable[[str, torch.Generator], Any]
"""A batch of a context, by the name of that."""
Cost = Callable[[Any], Tensor]
"""What a batch costs, a mean over its inputs, where the layer runs in its context."""


def fit_contexts(
    model: nn.Module, batches: Batches, cost: Cost, settings: ContextFit, *, learns: Literal["all", "module", "late"] = "all",
    contexts: Sequence[str] | None = None, folder: str | PathLike[str] | None = None, save_every: int = 500,
    accelerator: Any = None,
) -> ContextLayer:  # fmt: skip
    """Train the context layer in a model, and the model around it.

    Args:
        model: has one `ContextLayer`, or is one.
        batches: gives a batch of a context.
        cost: what it costs, a mean over inputs: for pictures the binary cross entropy, summed over pixels.
        settings: of the training.
        learns: "all"; "module", while the rest is frozen; or "late": the rest learns after the first fifth.
        contexts: those that batches are of. Default: the observed one and all others.
        folder: keeps a checkpoint, from which the same call goes on and ends with the same bits.
        save_every: steps between checkpoints.
        accelerator: accelerate's; brings the device, its precision, and other processes, which begin with the same model and
            draw batches of their own.
    Returns the layer, in `eval` mode as the model is.
    """
    settings.check()
    layer = next(part for part in model.modules() if isinstance(part, ContextLayer))
    learned, late, adam = _learning(model, layer, learns, settings.rate, accelerator)
    names = contexts or (OBSERVED, *layer.concepts)
    about = dumps([asdict(settings), learns, layer.concepts], sort_keys=True)
    path = None if folder is None else Path(folder) / CHECKPOINT
    begun = _restored(path, model.train(), learned, adam, about)
    for step in progress(range(begun, settings.steps), "fitting", total=settings.steps, initial=begun):
        g = layer.drawn = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        name = names[int(torch.randint(len(names), (), generator=g))]
        with layer.within(name):
            loss = _cost(batches, name, g, cost, accelerator) + settings.beta * layer.kl + _price(layer.effects, settings)
        _learn(adam, loss, settings.rate_at(step), late if step < settings.steps / 5 else (), accelerator)
        layer.clamp()
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            _keep(path, model, learned, adam, step + 1, about, accelerator)
    model.eval()
    return layer


def _learning(
    model: nn.Module, layer: ContextLayer, learns: str, rate: float, accelerator: Any
) -> tuple[dict[str, nn.Parameter], list[nn.Parameter], Any]:
    """What learns, by name, what of it waits at first, and its optimizer; the model is moved to where it is trained."""
    if accelerator is not None:
        model.to(accelerator.device)
    own = {*map(id, layer.parameters())}
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad and (learns != "module" or id(p) in own)}
    late = [p for p in learned.values() if learns == "late" and id(p) not in own]
    adam = torch.optim.Adam(learned.values(), lr=rate)
    return learned, late, adam if accelerator is None else accelerator.prepare_optimizer(adam)


def _cost(batches: Batches, name: str, g: torch.Generator, cost: Cost, accelerator: Any) -> Tensor:
    """What a batch of a context costs; each process draws its own."""
    if accelerator is None:
        return cost(batches(name, g))
    from accelerate.utils import send_to_device

    if accelerator.process_index:
        g.manual_seed(g.initial_seed() + (accelerator.process_index << 40))
    with accelerator.autocast():
        return cost(send_to_device(batches(name, g), accelerator.device))


def _learn(adam: Any, loss: Tensor, rate: float, waits: Sequence[Tensor], accelerator: Any) -> None:
    """One step of all parameters but those that wait, by the mean of all processes."""
    adam.zero_grad()
    (Tensor.backward if accelerator is None else accelerator.backward)(loss)
    for parameter in waits:
        parameter.grad = None
    if accelerator is not None and accelerator.num_processes > 1:
        for parameter in (p for group in adam.param_groups for p in group["params"] if p.grad is not None):
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    adam.param_groups[0]["lr"] = rate
    adam.step()


def _keep(
    path: Path | None, model: nn.Module, learned: Mapping[str, Tensor], adam: Any, step: int, about: str, accelerator: Any
) -> None:
    """All that the next step depends on, whole or not at all; by one process."""
    if path is None or not (accelerator is None or accelerator.is_main_process):
        return
    found = {f"model|{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in learned.items():
        found |= {f"{key}|{name}": tensor for key, tensor in adam.state[parameter].items()}
    save(path, {name: tensor.clone() for name, tensor in found.items()}, {"state": dumps({"step": step, "of": about})})


def _restored(path: Path | None, model: nn.Module, learned: Mapping[str, Tensor], adam: Any, about: str) -> int:
    """Load a checkpoint, if there is one; returns its step, or 0."""
    if path is None or not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        found = loads(file.metadata()["state"])
        if found["of"] != about:
            raise BadRecipe(f"expected settings and contexts as {path.parent.name!r} was begun with; take another folder")
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in file.keys():  # noqa: SIM118
            kind, _, own = name.partition("|")
            tensors.setdefault(kind, {})[own] = file.get_tensor(name)
    model.load_state_dict(tensors.pop("model"))
    for name, parameter in learned.items():
        own = {key: tensor[name] for key, tensor in tensors.items() if name in tensor}
        adam.state[parameter] = {key: t if key == "step" else t.to(parameter.device) for key, t in own.items()}
    return found["step"]
