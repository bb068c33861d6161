"""diffusers pipelines: their sites, denoising steps, guidance."""

from importlib.util import find_spec

from ...errors import MissingExtra

if find_spec("diffusers") is None:
    raise MissingExtra("pipelines need diffusers: pip install 'steerlib[diffusers]'")
