"""Total, direct and indirect effects: closed forms, and the laws they obey in a network that is steered."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from graphs.hierarchies import Layers

import steerlib as sl
from steerlib.graph.effects import effects
from steerlib.training.discover.systems import csr, held

N = 5000


def structural(outcome):
    """x -> m -> y and x -> y, with the same chance in every run; what is set is set."""
    g = torch.Generator().manual_seed(0)
    u, e = torch.randn(N, generator=g).double(), torch.randn(N, generator=g).double()

    def run(do):
        x = torch.as_tensor(do["x"]).double().expand(N)
        m = torch.as_tensor(do["m"]).double().expand(N) if "m" in do else 2 * x + u
        return {"x": x, "m": m, "y": outcome(x, m) + e}

    return run, u


def test_of_a_linear_model_effects_are_products_of_its_slopes():
    run, _ = structural(lambda x, m: 0.5 * m - 3 * x)
    found = effects(run, "x", "y", ["m"], value=1.5, reference=-0.5, controlled={"m": 7.0})
    wanted = {"te": -4.0, "nde": -6.0, "nie": 2.0, "tie": 2.0, "cde": -6.0}
    assert {name: float(value) for name, value in found._asdict().items()} == pytest.approx(wanted, abs=1e-9)


def test_where_causes_interact_the_total_is_the_direct_and_the_total_indirect_but_not_both_natural_ones():
    run, u = structural(lambda x, m: x * m)
    found = effects(run, "x", "y", ["m"], value=2.0, reference=1.0, controlled={"m": 5.0})
    m0, m1 = float((2 + u).mean()), float((4 + u).mean())
    wanted = {"te": 2 * m1 - m0, "nde": m0, "nie": m1 - m0, "tie": 2 * (m1 - m0), "cde": 5.0}
    assert {name: float(value) for name, value in found._asdict().items()} == pytest.approx(wanted)
    assert float(found.te) == pytest.approx(float(found.nde + found.tie), abs=1e-9)
    assert abs(float(found.te - found.nde - found.nie)) > 1


SITES = {"cause": "0", "mediator": "2", "aside": "2"}


@pytest.fixture
def network():
    """A network of three layers with a concept at the first, two at the second, and inputs for it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    )
    rows = torch.eye(8)
    banks = {
        name: sl.ConceptBank.from_directions({name: rows[i]}, site=SITES[name], base=model)
        for i, name in enumerate(("cause", "mediator", "aside"))
    }
    return model, banks, torch.randn(16, 1, 6)


def run_of(model, banks, x):
    """Concepts set row by row with `steer`; what each reads then, and the output."""

    def run(do):
        with ExitStack() as stack, torch.no_grad():
            for name, value in do.items():
                rows = torch.as_tensor(value).expand(len(x)).tolist()
                stack.enter_context(sl.steer(model, banks[name], {name: sl.Set(rows)}))
            tapes = {name: stack.enter_context(sl.record(model, bank)) for name, bank in banks.items()}
            output = model(x)[:, 0]
        return {"y": output, **{name: tape[name][0][1].reshape(len(x)) for name, tape in tapes.items()}}

    return run


def test_in_a_steered_network_the_total_effect_is_the_direct_and_the_total_indirect(network):
    found = effects(run_of(*network), "cause", "y", ["mediator"], value=1.0, reference=-1.0)
    torch.testing.assert_close(found.te, found.nde + found.tie, atol=1e-5, rtol=0)
    assert found.te.abs().min() > 1e-3 and (found.tie.abs() > 1e-3).all()


def test_setting_a_concept_to_its_own_reading_changes_nothing(network):
    run = run_of(*network)
    plain = run({})
    torch.testing.assert_close(run({"mediator": plain["mediator"]})["y"], plain["y"], atol=1e-6, rtol=0)


def test_what_does_not_follow_stays_and_dos_commute(network):
    run = run_of(*network)
    plain, moved = run({}), run({"mediator": 2.0})
    torch.testing.assert_close(moved["cause"], plain["cause"], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved["aside"], plain["aside"], atol=1e-6, rtol=0)
    one, other = run({"mediator": 2.0, "aside": -1.0}), run({"aside": -1.0, "mediator": 2.0})
    torch.testing.assert_close(one["y"], other["y"], atol=1e-6, rtol=0)
    assert (one["y"] - plain["y"]).abs().max() > 0.1


def test_in_layers_without_edges_over_a_level_all_of_an_effect_is_indirect():
    system = Layers((20, 20, 20), 400, rate=0.1, spontaneous=0.05, fed=1.0)
    every = np.arange(400)

    def run(do):
        dos = {name: held(csr(torch.as_tensor(z).numpy())) for name, z in do.items()}
        return {name: torch.from_numpy(r.flows.toarray()) for name, r in system.run(every, dos).items()}

    z = run({})["level0"]
    found = effects(run, "level0", "level2", ["level1"], value=2 * z, reference=z)
    torch.testing.assert_close(found.te, found.nde + found.tie, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.nde, torch.zeros_like(found.nde), atol=1e-9, rtol=0)
    assert found.tie.max() > 0.1
