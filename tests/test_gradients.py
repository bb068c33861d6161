"""Gradients: through checkpointed parts, in whatever order and thread they run again; and of directions themselves."""

import gc
import threading
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import tiny
from tiny_pipelines import PIPELINES
from torch import nn
from torch.utils.checkpoint import checkpoint

import steerlib as sl
from steerlib import encoders
from steerlib.errors import Outlived, Unanswerable
from steerlib.hooks.attach import attachment
from steerlib.steering.compiled import why_not

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # of nested parts, in their first run
]

FIRST = {
    "input_ids": torch.tensor([[0, 0, 3, 5, 7, 9, 11], [4, 6, 8, 10, 12, 14, 16]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
}
SECOND = {
    "input_ids": torch.tensor([[2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 5, 6, 7]]),
    "attention_mask": torch.tensor([[1] * 7, [0, 0, 0, 0, 1, 1, 1]]),
}


def in_thread(action):
    """Do something in a thread that knows nothing."""
    failed = []

    def run():
        try:
            action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Tower(nn.Module):
    """Blocks that are checkpointed two at a time, and a part inside each of these again."""

    def __init__(self, run):
        super().__init__()
        self.blocks, self.run = nn.ModuleList(Residual() for _ in range(4)), run

    def pair(self, first, x):
        for block in self.blocks[first : first + 2]:
            x = self.run(block, x) if first else block(x)
        return x

    def forward(self, x):
        for first in (0, 2):
            x = self.run(partial(self.pair, first), x)
        return x


class Own(torch.autograd.Function):
    """Checkpointing as libraries write it for themselves."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


WAYS = {
    "reentrant": lambda run, *args: checkpoint(run, *args, use_reentrant=True),
    "not reentrant": lambda run, *args: checkpoint(run, *args, use_reentrant=False),
    "a function of one's own": Own.apply,
}
EDITS = {
    "add": {"a": sl.Add(4.0)},
    "slice": {"a": sl.Add(4.0, tokens=slice(0, 3))},
    "set": {"a": sl.Set(2.0), "b": sl.Ablate(tokens=slice(1, None))},
    "rows": {"a": sl.Scale([3.0, 0.5])},
    "gate": {"a": sl.Add(2.0, gate=sl.Gate("b", above=0.0))},
}


def bank_of(model, site, width):
    generator = torch.Generator().manual_seed(1)
    vectors = {name: torch.randn(width, generator=generator) for name in "ab"}
    return sl.ConceptBank.from_directions(vectors, site=site, base=model)


def grads(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("site", ["layers.1", "layers.1.mlp.in", "layers.1.attn.heads", "layers.0.update"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_run_again_as_they_ran(site, reentrant):
    """Two passes before one backward, in another thread, after other passes: the gradients are those without checkpointing."""

    def gradients(is_checkpointed, edits):
        torch.manual_seed(0)
        model = tiny("llama").train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        bank = bank_of(model, site, model.config.hidden_size)
        with sl.steer(model, bank, edits) as session, sl.record(model, bank, ["a"]) as tape:
            losses = [model(**given, use_cache=False).logits[:, -1].logsumexp(-1).sum() for given in (FIRST, SECOND)]
            with torch.no_grad():
                model(**SECOND)
            in_thread((losses[0] - 2 * losses[1]).backward)
        return grads(model), [str(session.report()), len(tape["a"])]

    for edits in EDITS.values():
        (plain, said), (found, said_too) = (gradients(is_checkpointed, edits) for is_checkpointed in (False, True))
        torch.testing.assert_close(found, plain)
        assert said == said_too  # a second run is neither counted nor recorded


@pytest.mark.parametrize("way", WAYS)
def test_parts_are_known_whoever_checkpoints_them(way):
    """Several blocks at once, parts inside parts, a whole model, blocks called by hand; what is set changes meanwhile."""

    def gradients(run, edits, call):
        torch.manual_seed(0)
        model = Tower(run)
        bank = sl.ConceptBank.from_directions({"a": torch.randn(8), "b": torch.randn(8)}, site="blocks.1.up", base=model)
        far = sl.ConceptBank.from_directions({"a": torch.randn(8)}, site="blocks.3.down", base=model)
        x = torch.randn(2, 3, 8, requires_grad=True)
        steering, inner = sl.attach(model, bank).set(edits), sl.steer(model, far, {"a": sl.Set(1.0)})
        with inner:
            one = call(model, x)
            steering.set({"a": -1.0})
            two = call(model, x.detach() * 2 + x)
            steering.clear()
            in_thread((one.square().sum() + two.square().sum()).backward)
        steering.detach()
        return torch.cat([grads(model), torch.as_tensor(x.grad).flatten()])

    calls = {
        "the model": lambda model, x: model(x),
        "around the model": lambda model, x: model.run(model, x),
        "by hand": lambda model, x: model.run(model.blocks[3], model.run(model.blocks[1], x)),
    }
    for call in calls.values():
        for edits in EDITS.values():
            plain, found = (gradients(run, edits, call) for run in (lambda run, *args: run(*args), WAYS[way]))
            torch.testing.assert_close(found, plain)


def test_a_model_that_is_run_again_as_a_whole_is_one_pass(monkeypatch):
    """Where its pass stands is not looked up again, which the caller's frames would not show then."""
    model = tiny("llama")
    bank = bank_of(model, "layers.0", 32)
    with sl.steer(model, bank, {"a": 2.0}) as session:
        looked: list[Any] = []
        (host,) = {clock.host for clock in attachment(session.host).clocks.values()}
        state = host.state
        monkeypatch.setattr(host, "state", lambda *args: looked.append(args) or state(*args))
        checkpoint(lambda ids: model(ids).logits, FIRST["input_ids"], use_reentrant=False).sum().backward()
        assert len(looked) == 1 and session.report().lines[0].passes == 1


def test_a_block_that_ends_before_backward_is_noticed():
    """Its edits cannot be done again; a pass that backward has come to, or whose graph is gone, is no reason to say so."""
    model = tiny("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    bank = bank_of(model, "layers.0.mlp", model.config.hidden_size)
    with pytest.warns(Outlived, match="Call backward"), sl.steer(model, bank, {"a": 2.0}):
        loss = model(**FIRST, use_cache=False).logits.sum()
    del loss
    gc.collect()
    with sl.steer(model, bank, {"a": 2.0}):
        kept = model(**FIRST, use_cache=False).logits.sum()
        kept.backward()
        model(**FIRST, use_cache=False)
    with sl.steer(model, bank, {"a": 2.0}), torch.no_grad():
        model(**FIRST)


def test_a_second_run_that_cannot_be_told_from_a_first_is_refused():
    """A hook of autograd that calls a part of the model by hand: nothing shows whose run it repeats."""
    torch.manual_seed(0)
    model = Tower(lambda run, *args: run(*args))
    bank = sl.ConceptBank.from_directions({"a": torch.randn(8)}, site="blocks.1", base=model)
    with sl.steer(model, bank, {"a": 2.0}):
        y = model(torch.randn(1, 2, 8))
        y.register_hook(lambda gradient: model.blocks[1](gradient))
        with pytest.raises(Unanswerable, match="checkpointing off"):
            y.sum().backward()
        again = model(torch.randn(1, 2, 8))
        again.register_hook(lambda gradient: model(gradient))  # the whole model: a pass like any other
        again.sum().backward()


# -- gradients of directions -------------------------------------------------------------------------------------


def by_hand(kind, v, x, value):
    """What each intervention makes of activations, in the formulas of its documentation."""
    z = (x @ v / v.dot(v))[..., None]
    return {
        "add": x + value * v,
        "rows": x + torch.tensor([value, -1.0])[:, None, None] * v,
        "scale": x + (value - 1) * z * v,
        "set": x + (value - z) * v,
        "ablate": x - z * v,
        "clamp": x + (z.clamp(max=value) - z) * v,
        "gate": x + value * v * (z > 0.05),
        "norm": (y := x + value * v) * x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True),
    }[kind]


LEARNT = {
    "add": sl.Add(0.7),
    "rows": sl.Add([0.7, -1.0]),
    "scale": sl.Scale(0.7),
    "set": sl.Set(0.7),
    "ablate": sl.Ablate(),
    "clamp": sl.Clamp(high=0.7),
    "gate": sl.Add(0.7, gate=sl.Gate("v", above=0.05)),
    "norm": sl.Add(0.7, keep_norm=True),
}


@pytest.mark.parametrize("kind", LEARNT)
@pytest.mark.parametrize("source", ["vector", "half vector", "encoder"])
def test_a_vector_learns_through_steer_as_through_a_hook_by_hand(kind, source):
    """Loss and gradient of three optimiser steps, each of which the next pass uses; other vectors of the bank stay."""
    model, found = tiny("llama").requires_grad_(False), []
    start, other = torch.randn(2, 32, generator=torch.Generator().manual_seed(4)).unbind()
    for is_by_hand in (True, False):
        v = (start.half() if source == "half vector" else start.clone()).requires_grad_()
        if source == "encoder":
            bank = sl.ConceptBank.from_encoder(sl.Directions(v[None].detach().requires_grad_()), site="layers.0", base=model)
            learnt: Any = bank.encoder("layers.0")
            v, name = learnt.decoder, "layers.0/0"
        else:
            bank, name = sl.ConceptBank.from_directions({"v": v, "w": other}, site="layers.0", base=model), "v"
        if kind == "gate" and source == "encoder":
            return  # a gate names a concept
        optimizer = torch.optim.SGD([v], lr=0.05)
        flat = (lambda v: v[0]) if source == "encoder" else (lambda v: v.float())

        def hook(module, args, output, v=v, flat=flat):
            return by_hand(kind, flat(v), output, 0.7)

        for _ in range(3):
            optimizer.zero_grad()
            if is_by_hand:
                handle = model.model.layers[0].register_forward_hook(hook)
                loss = model(FIRST["input_ids"]).logits.logsumexp(-1).sum()
                handle.remove()
            else:
                with sl.steer(model, bank, {name: LEARNT[kind]}, allow_ood=True) as session:
                    loss = model(FIRST["input_ids"]).logits.logsumexp(-1).sum()
                assert session.report().ran
            loss.backward()
            found.append((loss.detach(), torch.as_tensor(v.grad).clone()))
            optimizer.step()
    for (loss, gradient), (loss_too, gradient_too) in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(loss_too, loss, rtol=1e-5, atol=1e-4)
        tolerance = 1e-2 if source == "half vector" else 1e-4
        torch.testing.assert_close(gradient_too, gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
def test_an_encoder_of_latents_learns_through_steer(kind):
    """Finite differences of the loss along a random direction of its tensors, with the cap binding too."""
    kinds: Any = encoders.KINDS
    model, generator = tiny("llama").requires_grad_(False).double(), torch.Generator().manual_seed(4)
    rows = torch.randn(64, 32, generator=generator)
    extra = {"topk": {"k": 8}, "jumprelu": {"threshold": torch.zeros(64)}}.get(kind, {})
    tensors = {"encoder": rows, "bias": torch.full((64,), 0.1), "decoder": rows / 32}
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    for norm in (None, 0.5):
        bank = sl.ConceptBank.from_encoder(kinds[kind](**tensors, **extra), site="layers.0", base=model, norm=norm)
        edits = {"layers.0/3": sl.Scale(3.0), "layers.0/5": sl.Add(4.0), "layers.0/7": sl.Set(2.0)}

        def loss(bank=bank, edits=edits):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is capped
                with sl.steer(model, bank, edits):
                    return model(FIRST["input_ids"]).logits.logsumexp(-1).sum()

        gradients = torch.autograd.grad(loss(), list(tensors.values()))
        ways = [torch.randn(tensor.shape, generator=generator) for tensor in tensors.values()]
        along = torch.stack([(g * way).sum() for g, way in zip(gradients, ways, strict=True)]).sum()
        ends = []
        for step in (2e-3, -4e-3):
            with torch.no_grad():
                for tensor, way in zip(tensors.values(), ways, strict=True):
                    tensor += step * way
            ends.append(loss().detach())
        with torch.no_grad():
            for tensor, way in zip(tensors.values(), ways, strict=True):
                tensor += 2e-3 * way
        torch.testing.assert_close((ends[0] - ends[1]) / 4e-3, along.double(), rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_vector_learns_beside_checkpointing(way):
    """Also at two sites, in two sessions, and where gates read it."""
    gradients = []
    for run in (lambda run, *args: run(*args), WAYS[way]):
        torch.manual_seed(0)
        model = Tower(run)
        v, w = torch.randn(2, 8).unbind()
        v, w = v.clone().requires_grad_(), w.clone().requires_grad_()
        bank = sl.ConceptBank.from_directions({"v": v}, site=["blocks.1.up", "blocks.3"], base=model)
        other = sl.ConceptBank.from_directions({"w": w, "g": w.detach()}, site="blocks.3", base=model)
        with sl.steer(model, bank, {"v": sl.Set(1.0)}), sl.steer(model, other, {"w": sl.Add(1.0, tokens=slice(1, None))}):
            model(torch.randn(2, 3, 8, requires_grad=True)).square().sum().backward()
        gradients.append(torch.stack([torch.as_tensor(v.grad), torch.as_tensor(w.grad)]))
    torch.testing.assert_close(*gradients)


def test_what_learns_is_saved_as_it_is_and_refused_where_it_cannot_work(tmp_path):
    model, v = tiny("llama"), torch.randn(32, requires_grad=True)
    bank = sl.ConceptBank.from_directions({"v": v}, site="layers.0", base=model)
    with torch.no_grad():
        v *= 2
    bank.save_pretrained(tmp_path / "bank")
    whole: Any = sl.ConceptBank.from_pretrained(tmp_path / "bank").encoder("layers.0")
    saved = whole.decoder[0]
    assert torch.equal(saved, v.detach()) and not saved.requires_grad
    (edit,) = sl.steer(model, bank, {"v": 1.0}).plan.edits
    assert "requires gradients" in why_not(edit, blind=False)  # what a compiled site is refused with


PLACES = ("mid_block.attentions.0.transformer_blocks.0.attn1", "down_blocks.0.resnets.0", "mid_block.resnets.0.conv1")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_denoisers_run_again_as_they_ran(place, reentrant):
    """Two noise levels before one backward, as a loss over steps has, in another thread; edits by level and by image."""

    def gradients(is_checkpointed):
        pipe = PIPELINES["sd1"].build()
        unet, generator = pipe.unet.train(), torch.Generator().manual_seed(5)
        if is_checkpointed:
            unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
        with torch.no_grad(), sl.record(pipe, [f"unet.{place}"]) as tape:
            unet(torch.randn(2, 4, 16, 16), 900, torch.randn(2, 6, 16))
        vector = torch.randn(tape[f"unet.{place}"][0][1].shape[-1], generator=generator)
        bank = sl.ConceptBank.from_directions({"a": vector}, site=f"unet.{place}", base=pipe)
        x, words = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 6, 16, generator=generator)
        edits = {"a": sl.Set([2.0, -1.0], when=sl.Window(0.0, 0.5))}
        with sl.steer(pipe, bank, edits), sl.steer(pipe, bank, {"a": sl.Add(1.0, when=sl.Window(0.3, 1.0))}):
            losses = [unet(x.requires_grad_(), level, words)[0].square().sum() for level in (900, 600, 100)]
            in_thread(torch.stack(losses).sum().backward)
        return grads(unet)

    plain, found = gradients(False), gradients(True)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_a_trainer_that_checkpoints_gets_the_gradients_of_one_that_does_not(tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate, of the extra dev")
    from transformers import Trainer, TrainingArguments

    rows: Any = [{"input_ids": row, "labels": row} for row in FIRST["input_ids"]]
    after = []
    for is_checkpointed in (False, True):
        model = tiny("llama")
        bank = bank_of(model, "layers.0.mlp", model.config.hidden_size)
        options = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 0}
        arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=is_checkpointed, **options)
        with sl.steer(model, bank, {"a": sl.Set(2.0, tokens=slice(1, 4))}) as session:
            Trainer(model=model, args=arguments, train_dataset=rows).train()
        after.append((torch.cat([p.detach().flatten() for p in model.parameters()]), str(session.report())))
    torch.testing.assert_close(after[0][0], after[1][0], rtol=1e-4, atol=1e-5)
    assert after[0][1] == after[1][1]
