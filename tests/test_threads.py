"""The number of processor threads: found by a trial, which leaves nothing behind; a number that is given is taken."""

import pytest
import torch

from steerlib.threads import best_threads, fewest_fast, use_threads


@pytest.mark.parametrize(
    ("seconds", "count"),
    [({1: 1.0}, 1), ({1: 1.0, 2: 0.6}, 2), ({1: 1.0, 2: 0.95}, 1), ({1: 1.0, 2: 12.0}, 1), ({1: 1.0, 2: 0.6, 4: 0.58}, 2)],
)
def test_more_threads_are_taken_only_if_they_are_clearly_faster(seconds, count):
    assert fewest_fast(seconds) == count


def test_the_trial_changes_neither_the_number_of_threads_nor_the_random_generator(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    assert best_threads(0.02) in (1, 2)
    assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), before)


def test_what_the_user_chose_is_taken(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    assert best_threads() == 2 == use_threads()
    assert use_threads(1) == 1 == torch.get_num_threads()
