"""The diffusion model as engines: export, parity, build, the sampling loop."""
