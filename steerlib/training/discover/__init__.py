"""Stage 4: which latent moves which: proposed from data, confirmed by interventions."""
