"""What edits do to x, against closed forms."""

import random
import subprocess
import sys

import pytest
import torch

import steerlib as sl
from steerlib.bank.concepts import Place
from steerlib.errors import BadEdit, ConflictingEdits, WrongWidth
from steerlib.passes import TextPass
from steerlib.schedules import gain
from steerlib.steering.compiled import CompiledEdit
from steerlib.steering.edit import Edit, EditTensors, Given
from steerlib.steering.interventions import Coordinate
from steerlib.steering.program import Program, Run
from steerlib.steering.reading import RowReader
from steerlib.steering.shares import When

D = 12


def directions(*vectors, mean=None):
    return sl.Directions(torch.stack(vectors), mean)


def edit(k, encoder, intervention, unit=1.0):
    place, rows = Place("s", k, unit), encoder.rows([k])
    aim = intervention.aim(Coordinate(f"c{k}", "s", unit, RowReader(rows)))
    shares = () if intervention.when is None else (When(intervention.when),)
    return Edit(key=k, name=f"c{k}", place=place, rows=rows, read=RowReader(rows), aim=aim, shares=shares)


@pytest.fixture
def x():
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder():
    g = torch.Generator().manual_seed(1)
    return directions(*torch.randn(3, D, generator=g), mean=torch.tensor([0.3, -0.2, 0.1]))


def run(x, *edits, state=None, cap=float("inf")):
    return Run(Program(edits, cap=cap))(x, state or TextPass(x.shape[1]))


def test_reading_is_the_projection_in_units_of_the_direction(encoder, x):
    d, mean = encoder.decoder[1], encoder.mean[1]
    torch.testing.assert_close(encoder.encode(x)[..., 1], x @ d / d.square().sum() - mean)


def test_add_moves_by_amount_times_unit_times_direction(encoder, x):
    torch.testing.assert_close(run(x, edit(0, encoder, sl.Add(2.0), unit=0.5)) - x, encoder.decoder[0].expand_as(x))


@pytest.mark.parametrize("k", [0, 1, 2])
def test_set_reads_its_value_and_changes_only_along_its_direction(encoder, x, k):
    y = run(x, edit(k, encoder, sl.Set(1.5)))
    torch.testing.assert_close(encoder.encode(y)[..., k], torch.full((2, 5), 1.5))
    d = encoder.decoder[k] / encoder.decoder[k].norm()
    rest = (y - x) - ((y - x) @ d)[..., None] * d
    assert rest.abs().max() < 1e-5


def test_scale_ablate_and_clamp(encoder, x):
    z = encoder.encode(x)[..., 0]
    torch.testing.assert_close(encoder.encode(run(x, edit(0, encoder, sl.Scale(3.0))))[..., 0], 3 * z)
    torch.testing.assert_close(encoder.encode(run(x, edit(0, encoder, sl.Ablate())))[..., 0], torch.zeros(2, 5))
    torch.testing.assert_close(encoder.encode(run(x, edit(0, encoder, sl.Clamp(-0.1, 0.1))))[..., 0], z.clamp(-0.1, 0.1))


def test_targets_are_met_together_by_the_shortest_change(encoder, x):
    edits = [edit(0, encoder, sl.Set(1.0)), edit(1, encoder, sl.Ablate()), edit(2, encoder, sl.Add(0.7))]
    y = run(x, *edits)
    z = encoder.encode(y)
    torch.testing.assert_close(z[..., 0], torch.ones(2, 5))
    torch.testing.assert_close(z[..., 1], torch.zeros(2, 5), atol=1e-5, rtol=0)
    moved = x + 0.7 * encoder.decoder[2]
    miss = torch.stack((1 - encoder.encode(moved)[..., 0], -encoder.encode(moved)[..., 1]), -1)
    torch.testing.assert_close(y, moved + miss @ torch.linalg.pinv(encoder.encoder[:2]).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("intervention", [sl.Add(1.0), sl.Set(1.0)])
def test_activations_of_another_width_are_refused(encoder, x, intervention):
    with pytest.raises(WrongWidth, match=f"'c0' expects activations of width {D}, the site has {D - 4}"):
        run(x[..., 4:], edit(0, encoder, intervention))


def test_order_cannot_matter(encoder, x):
    edits = [edit(0, encoder, sl.Set(1.0)), edit(1, encoder, sl.Clamp(0.0, 0.2)), edit(2, encoder, sl.Add(0.7))]
    edits.append(edit(2, encoder, sl.Scale(0.5)))
    torch.testing.assert_close(run(x, *edits), run(x, *edits[::-1]))


@pytest.mark.parametrize("intervention", [sl.Add(0.0), sl.Scale(1.0), sl.Clamp(-1e9, 1e9), sl.Add(3.0, when=sl.Steps(5))])
def test_what_changes_nothing_is_bit_identical(encoder, x, intervention):
    assert torch.equal(run(x, edit(0, encoder, intervention)), x)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_ramped_set_goes_part_of_the_way(encoder, x, share):
    when = sl.Ramp(sl.Steps(0, 8), first=share, last=share)
    y, z = run(x, edit(0, encoder, sl.Set(2.0, when=when))), encoder.encode(x)[..., 0]
    torch.testing.assert_close(encoder.encode(y)[..., 0], z + share * (2.0 - z))


def test_a_change_is_cut_to_the_cap_and_keeps_its_direction(encoder, x):
    y = run(x, edit(0, encoder, sl.Add(9.0)), cap=2.0)
    torch.testing.assert_close((y - x).norm(dim=-1), torch.full((2, 5), 2.0))
    torch.testing.assert_close((y - x)[0, 0] / 2, encoder.decoder[0] / encoder.decoder[0].norm())
    z = run(x, edit(0, encoder, sl.Set(9.0)), edit(1, encoder, sl.Add(4.0)), cap=2.0)
    assert ((z - x).norm(dim=-1) <= 2.0001).all()


@pytest.mark.parametrize("removal", [sl.Ablate(), sl.Scale(0.1), sl.Set(0.0), sl.Clamp(-0.01, 0.01)])
def test_a_removal_is_never_capped(encoder, x, removal):
    torch.testing.assert_close(run(x, edit(0, encoder, removal), cap=1e-3), run(x, edit(0, encoder, removal)))


def test_beside_removals_the_additions_alone_are_capped(encoder, x):
    """What is taken away is the shortest change to the removed reading that leaves forced ones as they were; the rest goes as
    far along as the cap."""
    g = torch.Generator().manual_seed(5)
    many = directions(*torch.randn(5, D, generator=g))
    edits = [edit(0, many, sl.Ablate()), edit(1, many, sl.Set(9.0)), edit(2, many, sl.Add(7.0)), edit(3, many, sl.Scale(0.2))]
    whole, capped, z = run(x, *edits), run(x, *edits, cap=2.0), many.encode(x)
    less = -0.8 * z[..., 3, None] * many.decoder[3]
    own = torch.stack((-z[..., 0], torch.zeros(2, 5)), -1) - less @ many.encoder[:2].T
    less = less + own @ torch.linalg.pinv(many.encoder[:2]).T
    more = whole - x - less
    torch.testing.assert_close(capped, x + less + more * 2 / more.norm(dim=-1, keepdim=True), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(many.encode(capped)[..., 0], torch.zeros(2, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(many.encode(whole)[..., 0], torch.zeros(2, 5), atol=1e-4, rtol=0)


def test_a_target_that_leads_away_from_0_is_capped_and_one_that_leads_there_is_not(encoder, x):
    z = encoder.encode(x)[..., 0]
    value = float(z.median())
    found = encoder.encode(run(x, edit(0, encoder, sl.Set(value)), cap=1e-3))[..., 0]
    nearer = (z - value) * value >= 0
    assert nearer.any() and (~nearer).any()
    torch.testing.assert_close(found[nearer], torch.full_like(found[nearer], value))
    step = (value - z[~nearer]).sign() * 1e-3 / encoder.decoder[0].norm()
    torch.testing.assert_close(found[~nearer], z[~nearer] + step, atol=1e-5, rtol=0)


def test_the_constant_path_equals_the_general_formula(encoder, x):
    edits = [edit(0, encoder, sl.Add([1.0, -2.0])), edit(1, encoder, sl.Add(0.5))]
    program = Program(edits, cap=3.0)
    assert program.is_constant
    change = EditTensors.of(edits, 3.0).change(x, Given(row=torch.arange(2)))
    torch.testing.assert_close(Run(program)(x, TextPass(5)), x + change.delta)


@pytest.mark.parametrize("seed", range(6))
def test_what_compiled_code_runs_equals_the_general_formula(encoder, x, seed):
    """Also capped, and beside removals."""
    draw = random.Random(seed)
    kinds = [sl.Ablate(), sl.Set(9.0), sl.Add(7.0), sl.Scale(0.2), sl.Clamp(-0.1, 0.1), sl.Add([3.0, -2.0])]
    edits = [edit(k, encoder, draw.choice(kinds)) for k in range(3)]
    compiled = CompiledEdit(5, 4, D, torch.device("cpu"))
    for cap in (2.0, float("inf")):
        compiled.fill(edits, cap)
        torch.testing.assert_close(compiled(x, TextPass(5)), run(x, *edits, cap=cap), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_coordinates_are_float32_whatever_the_model_is(encoder, x, dtype, tolerance):
    y = run(x.to(dtype), edit(0, encoder, sl.Set(1.0)))
    assert y.dtype == dtype
    torch.testing.assert_close(encoder.encode(y)[..., 0], torch.ones(2, 5), atol=tolerance, rtol=0)


def test_gradients_flow_through_every_kind_of_edit(encoder, x):
    for intervention in (sl.Add(1.0), sl.Scale(2.0), sl.Set(1.0), sl.Clamp(0.0)):
        leaf = x.clone().requires_grad_()
        run(leaf, edit(0, encoder, intervention), edit(1, encoder, sl.Ablate())).square().sum().backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    leaf = x.clone().requires_grad_()
    run(leaf, edit(0, encoder, sl.Set(1.0))).sum().backward()  # x + (v - <x, d>/|d|^2) d: gradient 1 - (sum d) d / |d|^2
    d = encoder.decoder[0]
    torch.testing.assert_close(leaf.grad, (1 - d.sum() * d / d.square().sum()).expand_as(x))


def test_gain_of_every_schedule():
    moments = torch.tensor([0.0, 1, 2, 3, 4, 9])
    numbers = torch.tensor(
        [sl.Steps(1, 3).numbers(), sl.Ramp(sl.Steps(1, 3)).numbers(), sl.Ramp(sl.Steps(0, 4), 1, 0).numbers()]
    )
    expected = [[0, 1, 1, 0, 0, 0], [0, 0, 0.5, 1, 1, 1], [1, 0.75, 0.5, 0.25, 0, 0]]
    torch.testing.assert_close(gain(moments[:, None], numbers).T, torch.tensor(expected))
    whole = torch.tensor([sl.Window(0.5, 1.0).numbers(), sl.Window(0.0, 0.5).numbers()])
    torch.testing.assert_close(gain(torch.tensor([[0.0], [0.5], [1.0]]), whole).T, torch.tensor([[0.0, 1, 1], [1, 0, 0]]))


@pytest.mark.parametrize("make", [
    lambda: sl.Window(-0.1, 0.5), lambda: sl.Window(0.5, 0.5), lambda: sl.Steps(-1), lambda: sl.Steps(3, 3),
    lambda: sl.Ramp(sl.Steps(0)), lambda: sl.Add(float("nan")), lambda: sl.Add([]), lambda: sl.Clamp(),
    lambda: sl.Clamp(1.0, 0.0), lambda: sl.Add(1.0, tokens=slice(-3, None)), lambda: sl.Gate("a", above=0.0, full=-1.0),
    lambda: sl.Gate("a", above=1.0, below=0.0), lambda: sl.Gate("a", full=1.0), lambda: sl.Gate("a", below=2.0, full=1.0),
    lambda: sl.Gate("a", above=0.0, below=2.0, full=1.0), lambda: sl.Gate("a", above=0.0, full=float("inf")),
    lambda: sl.Gate("a", above=float("nan")), lambda: sl.Gate("a", above=0.0, full=float("nan")),
])  # fmt: skip
def test_impossible_values_are_refused_where_they_are_written(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_words_nobody_knows_are_refused_too():
    """In a process of its own: under the type checker of the other tests these would not get as far."""
    code = """
import steerlib as sl
for wrong in (dict(tokens="both"), dict(unit="sigma"), dict(when=0.5), dict(branch="left"), dict(gate="shut")):
    try:
        sl.Add(1.0, **wrong)
    except sl.errors.BadEdit as error:
        assert "expected" in str(error)
    else:
        raise AssertionError(wrong)

import torch
model = torch.nn.Sequential(torch.nn.Identity())
bank = sl.ConceptBank.from_directions({"a": torch.ones(4)}, site="0", base=model)
for wrong in ({"a": "much"}, {"a": None}, [("a", 1.0)]):
    for way in (lambda: sl.steer(model, bank, wrong), lambda: sl.attach(model, bank).set(wrong)):
        try:
            way()
        except sl.errors.BadEdit as error:
            assert "expected" in str(error)
        else:
            raise AssertionError(wrong)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interventions_are_values():
    assert sl.Add([1, 2]) == sl.Add((1.0, 2.0)) and hash(sl.Set(1.0)) == hash(sl.Set(1.0)) and sl.Set(1.0) != sl.Set(2.0)
    assert issubclass(ConflictingEdits, BadEdit)
