"""The three example programs run, and `steerlib examples` shows them as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "scripts" / "examples"


def run(*command, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.real
def test_text_is_steered(tmp_path):
    said = run(EXAMPLES / "text.py", 12, cwd=tmp_path)
    assert said.count(":") >= 4 and all(name in said for name in ("unsteered", "sports", "science", "fantasy"))
    answers = [line.split(":", 1)[1] for line in said.splitlines() if ":" in line]
    assert len({*answers}) == 4


def test_pictures_are_steered(tmp_path):
    run(EXAMPLES / "image.py", cwd=tmp_path)
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.real
def test_a_bank_is_trained_from_ten_sentences(tmp_path):
    said = run(EXAMPLES / "train.py", cwd=tmp_path)
    assert said.strip() and (tmp_path / "pirates" / "bank.json").is_file()


def test_the_command_lists_prints_and_copies_them(tmp_path):
    listed = run("-m", "steerlib", "examples", cwd=tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == ["image.py", "text.py", "train.py"]
    text = (EXAMPLES / "text.py").read_text()
    assert run("-m", "steerlib", "examples", "text", cwd=tmp_path) == text + "\n"
    run("-m", "steerlib", "examples", "--out", "mine", cwd=tmp_path)
    assert (tmp_path / "mine" / "text.py").read_text() == text and len([*(tmp_path / "mine").iterdir()]) == 3


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 40
