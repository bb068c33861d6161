"""Files of pictures in the layouts of dSprites, 3D Shapes and MPI3D, small ones made here."""

import numpy as np
import pytest
import torch

from steerlib import errors
from steerlib.evaluation import datasets
from steerlib.evaluation.datasets import chosen, read

SIDE = 4


def drawn(count, *channels):
    return np.random.default_rng(0).integers(2, 256, (count, SIDE, SIDE, *channels), np.uint8)


def test_dsprites(tmp_path):
    table = np.stack(np.unravel_index(np.arange(48), (1, 3, 2, 2, 2, 2)), 1)
    bits = drawn(48) % 2
    path = tmp_path / "dsprites.npz"
    values = {"latents_values": table / 2.0, "latents_classes": table}
    np.savez_compressed(path, imgs=bits, **values, metadata=np.array({"author": "a pickle"}, dtype=object))
    found = read(path)
    torch.testing.assert_close(found.inputs, torch.as_tensor(bits)[:, None].float())
    assert list(found.factors) == ["shape", "scale", "orientation", "x", "y"]  # there is one colour
    assert found.factors["shape"] == table[:, 1].tolist()


def test_3d_shapes(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs h5py, of the extra dev")
    images, labels = drawn(40, 3), np.random.default_rng(1).integers(3, size=(40, 6)) / 10
    with h5py.File(tmp_path / "3dshapes.h5", "w") as file:
        file["images"], file["labels"] = images, labels
    found = read(tmp_path / "3dshapes.h5", most=25)
    rows = chosen(40, 25)
    torch.testing.assert_close(found.inputs, torch.as_tensor(images[rows]).permute(0, 3, 1, 2).float() / 255)
    assert list(found.factors) == ["floor hue", "wall hue", "object hue", "scale", "shape", "orientation"]
    assert found.factors["scale"] == labels[rows, 3].tolist()
    (tmp_path / "own.h5").write_bytes((tmp_path / "3dshapes.h5").read_bytes())
    assert list(read(tmp_path / "own.h5").factors) == [f"factor {k}" for k in range(6)]  # six columns may mean anything
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["pixels"] = images
    with pytest.raises(errors.BadEdit, match="imgs or images in .*, got pixels"):
        read(tmp_path / "other.h5")


def test_a_file_of_hdf5_says_which_package_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(errors.MissingExtra, match="pip install h5py"):
        read(tmp_path / "3dshapes.h5")


def test_mpi3d_goes_through_all_combinations_in_order(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.MPI3D, 96, (2, 2, 2, 3, 1, 2, 2))
    images = drawn(96, 3)
    np.savez_compressed(tmp_path / "mpi3d_toy.npz", images=images)
    found = read(tmp_path / "mpi3d_toy.npz")
    assert list(found.factors) == ["color", "shape", "size", "height", "horizontal", "vertical"]
    assert found.factors["vertical"] == [0, 1] * 48 and found.factors["color"] == [0] * 48 + [1] * 48
    assert found.factors["height"][:12] == [0] * 4 + [1] * 4 + [2] * 4
    few = read(tmp_path / "mpi3d_toy.npz", most=30)
    rows = chosen(96, 30)
    assert len(rows) == 30 and rows.tolist() == sorted({*rows.tolist()})
    assert few.factors["vertical"] == (rows % 2).tolist()
    torch.testing.assert_close(few.inputs, found.inputs[rows])
    assert not read_of_another_count(tmp_path).factors  # what the rows are is not guessed


def read_of_another_count(folder):
    np.savez(folder / "more.npz", images=drawn(95, 3))
    return read(folder / "more.npz")


@pytest.mark.parametrize("at_once", [1, 7, 96])
def test_reading_in_parts_gives_the_same_rows(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(datasets, "AT_ONCE", at_once)
    images = drawn(20)
    np.savez(tmp_path / "a.npz", images=images, kind=np.arange(20))
    found = read(tmp_path / "a.npz", most=9)
    torch.testing.assert_close(found.inputs, torch.as_tensor(images[chosen(20, 9)])[:, None].float() / 255)
    assert found.factors["kind"] == chosen(20, 9).tolist()


def test_an_array_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(errors.BadEdit, match="as numbers"):
        read(tmp_path / "a.npz")
