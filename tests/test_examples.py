"""The example programs and jobs run, and `steerlib examples` shows the programs as they are."""

import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import toy_tokenizer, toy_writer

import steerlib as sl
from steerlib.encoders import ReLU

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


# -- jobs -------------------------------------------------------------------------------------------------------------

JOBS = re.findall(r"^```python\n(.*?)^```", (EXAMPLES / "jobs.md").read_text(), re.MULTILINE | re.DOTALL)
SITE = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2"


def names(pipe):
    """What `jobs.md` says is there, at toy size."""
    torch.manual_seed(0)
    model, tok, near = toy_writer().requires_grad_(False), toy_tokenizer(), toy_writer()
    with torch.no_grad():
        near.lm_head.weight.add_(0.1)
    vectors = {"a": {0: torch.randn(32)}, "b": {1: torch.randn(32)}}
    bank = sl.ConceptBank.from_directions(vectors, base=model, name="mine")
    more = {"second": {"a": torch.ones(32)}, "third": {"c": torch.ones(32)}}
    others = {name: sl.ConceptBank.from_directions(given, site=0, base=model, name=name) for name, given in more.items()}
    encoder = ReLU(encoder=torch.randn(6, 32), bias=torch.zeros(6), decoder=torch.randn(6, 32))
    calm = sl.Concept(name="calm", encoder="layers.0", index=2, unit=0.5)
    width = pipe.unet.get_submodule(SITE.removeprefix("unet.")).to_out[0].out_features
    scenes = sl.ConceptBank.from_directions({"snow": torch.randn(width)}, site=SITE, base=pipe, name="scenes")
    turns = [
        {"role": "user", "content": "why rain"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "now"},
    ]
    texts = ["warm bread", "green tea now", "the sun rises slowly", "black stone", "why snow"]
    return {
        "sl": sl, "torch": torch, "model": model, "model2": near, "model3": copy.deepcopy(near), "tok": tok,
        **others, "bank": bank,
        "rows": [{"text": text, "label": k < 3} for k, text in enumerate(texts)], "texts": texts, "width": 32,
        "preferences": [{"prompt": turns, "chosen": "warm bread", "rejected": "black stone"}],
        "count": lambda requests, answers: [len(answer) for answer in answers], "ids": torch.tensor([[3, 4, 5]]),
        "judge": lambda requests, answers: [len(answer) for answer in answers], "pipe": pipe, "scenes": scenes, "site": SITE,
        "kept": sl.ConceptBank.from_pretrained(scenes.save_pretrained("scenes")), "v": torch.ones(width),
        "w": torch.ones(width), "other": SITE.replace("attn2", "attn1"), "picture": Image.new("L", (16, 16), 255),
        "gated": bank.with_concepts([replace(bank["a"], gate=sl.Gate("b", above=0.0)), bank["b"]]),
        "latents": sl.ConceptBank.from_encoder(encoder, site="layers.0", base=model, concepts=[calm]),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::steerlib.errors.SteeringWarning")
def test_every_job_runs_as_it_is_written_in_at_most_six_lines(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sl.ConceptBank, "push_to_hub", lambda self, repo, **options: repo)  # tests/test_hub.py has the real one
    known = names(toy)
    for job in JOBS:
        assert len(job.splitlines()) <= 6 and max(map(len, job.splitlines())) <= 128
        exec(compile(job, job, "exec"), known)
    missing = [
        name for name in ("sweep.png", "sheet.png", "hill.png", "a.gguf", "gated.gguf", "sae") if not Path(name).exists()
    ]
    assert missing == [] and len(JOBS) > 20
    assert known["learnt"].grad.norm() > 0 and known["mine"]["polite"].range is None and known["both"]["their a"]
    assert {*known["newer"].fits(known["model3"]).values()} == {"same weights"} and known["same"]["a"]
