"""With `[cli]`: every command that needs no scorer and no downloaded model."""

import subprocess
import sys
import tempfile
from pathlib import Path

import steerlib

program = Path(steerlib.__file__).parents[4] / "bin" / "steerlib"


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints."""
    command = [sys.executable, "-I", "-W", "error", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


assert "concepts" in run("--help")
assert run("--version").startswith("steerlib ")
assert "scenes-32" in run("list")
assert "science" in run("concepts", "smollm2-135m-instruct", "science")
assert "What was measured" in run("info", "smollm2-135m-instruct")
assert "every file as it should be" in run("verify", "scenes-32")
assert all(name in run("examples") for name in ("image.py", "text.py", "train.py"))
assert "sl.steer(" in run("examples", "text")
assert "BadBank" in run("info", "no such bank", code=1)
with tempfile.TemporaryDirectory() as folder:
    run("graph", "scenes-32", "--out", Path(folder) / "graph.html")
    run("steer", "scenes-32", "a red square at night", "-e", "blue=1", "--out", Path(folder) / "steered.png")
    run("migrate", "smollm2-135m-instruct", Path(folder) / "new")
    assert {path.name for path in Path(folder).iterdir()} == {"graph.html", "steered.png", "new"}
assert "MissingExtra" in run("eval", "smollm2-135m-instruct", "--quick", code=1)
