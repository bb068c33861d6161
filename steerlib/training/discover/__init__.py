"""Stage 4: which latent moves which: proposed from data, confirmed by interventions."""

from importlib.util import find_spec

from ...errors import MissingExtra

if find_spec("scipy") is None:
    raise MissingExtra("causal graphs need scipy: pip install 'steerlib[train]'")
