"""One place where steering, replacing, recording and pinning meet; warnings at the line that caused them; what may be added
without an edit elsewhere."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, WITH_TEXT
from torch import Tensor, nn

import steerlib as sl
from steerlib import errors
from steerlib.passes import StepState
from steerlib.schedules import Schedule
from steerlib.steering.aims import Aim
from steerlib.steering.interventions import Coordinate, Intervention
from steerlib.steering.masks import Mask
from steerlib.steering.recording import observing, replacing

ROOT = Path(__file__).parent.parent
WIDTH = 4
X = torch.zeros(1, 3, WIDTH)


@pytest.fixture
def chain():
    """Three modules that pass their input on."""
    return nn.Sequential(*(nn.Identity() for _ in range(3)))


def ones(model, site, name="a"):
    return sl.ConceptBank.from_directions({name: torch.ones(WIDTH)}, site=site, base=model)


def plus(amount):
    return lambda x, _: x + amount


def test_what_replaces_and_what_steers_add_up_whoever_came_first(chain):
    with replacing(chain, {"0": plus(10.0)}), sl.steer(chain, ones(chain, "2"), {"a": 1.0}):
        assert torch.equal(chain(X), X + 11)
    with sl.steer(chain, ones(chain, "2"), {"a": 1.0}), replacing(chain, {"0": plus(10.0)}):
        assert torch.equal(chain(X), X + 11)
    assert torch.equal(chain(X), X)


def test_a_replacement_outlives_the_sessions_beside_it(chain):
    with replacing(chain, {"0": plus(10.0)}):
        with sl.steer(chain, ones(chain, "2"), {"a": 1.0}):
            pass
        assert torch.equal(chain(X), X + 10)


def test_edits_act_on_what_replaces_and_observers_see_both(chain):
    seen = []
    bank = ones(chain, "1")
    with (
        observing(chain, {"1": lambda x, _: seen.append(x.clone())}),
        sl.steer(chain, bank, {"a": sl.Set(2.0)}),
        replacing(chain, {"1": plus(10.0)}),
    ):
        out = chain(X)
    torch.testing.assert_close(out, X + 2)  # set, whatever came before
    assert torch.equal(seen[0], out) and len(seen) == 1
    with sl.steer(chain, bank, {"a": sl.Scale(3.0)}), replacing(chain, {"1": plus(10.0)}):
        torch.testing.assert_close(chain(X), X + 30)


def test_replacements_follow_each_other_in_the_order_of_coming(chain):
    with replacing(chain, {"0": plus(10.0)}), replacing(chain, {"0": lambda x, _: 2 * x}):
        assert torch.equal(chain(X), X + 20)


def test_a_session_beside_another_counts_its_own_edits_throughout(chain):
    one, other = ones(chain, "1"), ones(chain, "1", "b")
    with sl.steer(chain, one, {"a": 1.0}) as outer:
        chain(X)
        with sl.steer(chain, other, {"b": 1.0}) as inner:
            assert torch.equal(chain(X), X + 2)
            chain(X)
        chain(X)
        with sl.steer(chain, other, {"b": 1.0}):  # another one after it
            chain(X)
    (line,), (beside,) = outer.report().lines, inner.report().lines
    assert (line.passes, line.acted, line.tokens) == (5, 5, 15) and (beside.passes, beside.acted, beside.tokens) == (2, 2, 6)


def test_a_warning_points_at_the_line_of_the_user(tmp_path):
    """In a process of its own: the type checker of the other tests adds a call of its own to every function."""
    script = tmp_path / "mine.py"
    script.write_text(
        """
import torch, warnings
import steerlib as sl
chain = torch.nn.Sequential(torch.nn.Identity())
bank = sl.ConceptBank.from_directions({"a": torch.ones(4)}, site="0", base=chain, norm=1.0)
attached = sl.attach(chain, bank)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    session = sl.steer(chain, bank, {"a": 9.0})
    attached.set({"a": 9.0})
    with session:
        session.set({"a": 8.0})
print([(w.filename == __file__, w.lineno, w.category.__name__) for w in caught])
"""
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == str([(True, line, "OutOfRange") for line in (9, 10, 12)])


@pytest.mark.parametrize("tokens", ["prompt", "generated", slice(2)])
@pytest.mark.parametrize("make", [sl.Add, sl.Set])
def test_tokens_are_refused_where_there_are_none_to_count(tokens, make):
    pipe = PIPELINES["sd1"].build()
    site = "unet.mid_block.attentions.0.transformer_blocks.0"
    width = pipe.unet.mid_block.attentions[0].transformer_blocks[0].norm1.normalized_shape[0]
    bank = sl.ConceptBank.from_directions({"a": torch.ones(width)}, site=site, base=pipe)
    with pytest.raises(errors.Unanswerable, match="tokens of text"):
        sl.steer(pipe, bank, {"a": make(1.0, tokens=tokens)})


def test_tokens_of_a_text_encoder_are_counted():
    pipe, site = WITH_TEXT["sd_with_text"].build(), "text_encoder.layers.0"
    bank = sl.ConceptBank.from_directions({"a": torch.ones(pipe.text_encoder.config.hidden_size)}, site=site, base=pipe)
    ids = pipe.tokenizer("red cup", return_tensors="pt").input_ids
    with torch.no_grad(), sl.record(pipe, [site]) as before:
        pipe.text_encoder(ids)
    edits = {"a": sl.Add(5.0, tokens=slice(1, 2))}
    with torch.no_grad(), sl.record(pipe, [site]) as after, sl.steer(pipe, bank, edits):
        pipe.text_encoder(ids)
    moved = (after[site][0][1] - before[site][0][1]).abs().amax((0, 2)) > 1
    assert moved.tolist() == [i == 1 for i in range(ids.shape[1])]


# -- one class, no edit elsewhere --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halve(Aim):
    """A target that only the pass knows: half of what the concept reads."""

    read: Any
    is_target: bool = True

    def target(self, x: Tensor, now: StepState, twin: dict[Any, Tensor]) -> Tensor:
        return self.read(x, now) / 2


@dataclass(frozen=True)
class Half(Intervention):
    """Make the concept read half of what it reads."""

    def aim(self, at: Coordinate) -> Aim:
        return Halve(at.read)


def test_a_new_intervention_is_one_class(llama, bank):
    ids = torch.arange(10)[None]
    with torch.no_grad(), sl.record(llama, bank, ["a"]) as before:
        llama(ids)
    with torch.no_grad(), sl.record(llama, bank, ["a"]) as after, sl.steer(llama, bank, {"a": Half(tokens=slice(3, None))}):
        llama(ids)
    expected = before["a"][0][1].clone()
    expected[:, 3:] /= 2
    torch.testing.assert_close(after["a"][0][1], expected)
    assert "tokens:" in (Half.__doc__ or "")


@dataclass(frozen=True)
class Every(Schedule):
    """Every n-th step."""

    n: int
    clock: str = "steps"
    is_traceable = False

    def numbers(self) -> tuple[float, float, float, float, float]:
        raise AssertionError("compiled code cannot follow it")

    def weight(self, now: StepState) -> "float | Tensor":
        moment = now.moment
        return (moment % self.n == 0).float() if isinstance(moment, Tensor) else float(moment % self.n == 0)


def test_a_new_schedule_is_one_class(llama, bank):
    acted = []
    with torch.no_grad(), sl.record(llama, bank, ["a"]) as before:
        llama.generate(torch.arange(1, 6)[None], max_new_tokens=6, do_sample=False)
    with sl.steer(llama, bank, {"a": sl.Set(1.0, when=Every(2))}), sl.record(llama, bank, ["a"]) as tape:
        llama.generate(torch.arange(1, 6)[None], max_new_tokens=6, do_sample=False)
    acted = [bool((z - 1).abs().max() < 1e-4) for _, z in tape["a"]]
    assert acted == [True, False, True, False, True, False] and len(before["a"]) == 6
    attached = sl.attach(llama, bank)
    llama.forward = torch.compile(llama.forward, backend="eager")
    with pytest.raises(errors.Unanswerable, match="PerStep"):
        attached.set({"a": sl.Set(1.0, when=Every(2))})
    attached.detach()


@dataclass(frozen=True)
class Soft(sl.Gate):
    """A gate that opens like a logistic curve."""

    def passed(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z - self.above)


def test_a_new_gate_is_one_class(chain):
    bank = two_concepts(chain)
    x = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    with sl.steer(chain, bank, {"a": sl.Add(2.0, gate=Soft("b", above=0.5))}):
        moved = chain(x) - x
    torch.testing.assert_close(moved[..., 0], 2 * torch.sigmoid(x[..., 1] - 0.5))


def two_concepts(model):
    return sl.ConceptBank.from_directions({"a": torch.eye(WIDTH)[0], "b": torch.eye(WIDTH)[1]}, site="1", base=model)


class Even(Mask):
    """Every other token."""

    def share(self, state: StepState, x: Tensor, name: str) -> Tensor:
        return (torch.arange(x.shape[1]) % 2 == 0).float()[None]


def test_a_new_mask_is_one_class(chain):
    with sl.steer(chain, two_concepts(chain), {"a": sl.Add(1.0, mask=Even())}):
        assert chain(torch.zeros(2, 5, WIDTH))[..., 0].tolist() == [[1, 0, 1, 0, 1]] * 2
