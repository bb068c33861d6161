"""diffusers pipelines: their sites, denoising steps, guidance."""
