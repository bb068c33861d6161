"""What training keeps on disk is whole or not there, and read back instead of made again."""

import json

import pytest
import torch
from safetensors import safe_open

from steerlib.training.store import recorded, remembered, save, whole


def test_a_block_that_raises_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "state.json"
    with whole(path) as part:
        part.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(path) as part:
        part.write_text("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_folder_takes_the_place_of_an_older_one_and_of_what_a_killed_run_left(tmp_path):
    path = tmp_path / "pipeline"
    for content in ("old", "new"):
        (tmp_path / "pipeline.part").mkdir()
        (tmp_path / "pipeline.part" / "junk").write_text("of a killed run")
        with whole(path) as part:
            part.mkdir()
            (part / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_files_whose_names_differ_by_their_ending_do_not_share_an_unfinished_one(tmp_path):
    with whole(tmp_path / "a.json") as first, whole(tmp_path / "a.safetensors") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a.json").read_text() == "first" and (tmp_path / "a.safetensors").read_text() == "second"


@pytest.mark.parametrize("kept", [True, False])
def test_results_are_made_once_where_they_are_kept(tmp_path, kept):
    made = []

    def tensors():
        made.append("tensors")
        return {"x": torch.arange(6.0).reshape(2, 3).T}

    def value():
        made.append("value")
        return {"pair": (1, 2.5)}

    for _ in range(2):
        found = recorded(tmp_path / "a" / "x.safetensors" if kept else None, tensors)
        assert torch.equal(found["x"], torch.arange(6.0).reshape(2, 3).T)
        assert remembered(tmp_path / "b" / "x.json" if kept else None, value) == {"pair": [1, 2.5]}
    assert len(made) == (2 if kept else 4)


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name, {"b": torch.ones(2), "a": torch.zeros(3, requires_grad=True)}, {"state": json.dumps([1])})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", "pt") as file:
        assert json.loads(file.metadata()["state"]) == [1]
