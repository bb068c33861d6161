"""With `[cli]` and `[diffusers]`: the command line steers the pipeline that ships with a bank."""

import subprocess
import sys
import tempfile
from pathlib import Path

import steerlib

program = Path(steerlib.__file__).parents[4] / "bin" / "steerlib"
with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "steered.png"
    steer = ["steer", "scenes-32", "a red square at night", "-e", "blue=1", "--out", str(out)]
    done = subprocess.run([sys.executable, "-I", "-W", "error", program, *steer], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
