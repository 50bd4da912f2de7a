"""Stable Diffusion's parts in torch, and style tokens."""
