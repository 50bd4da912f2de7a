"""The recipe of the bundled generator ``glyphs-32``: a renderer of labelled, captioned 32x32 pictures.

Every picture shows one digit or capital letter, drawn from fonts, pen strokes, display segments or dots and
passed through a simulated scene and camera. A latent diffusion model is trained on these pictures and nothing
else; the renderer reads no photograph. Nobody but the command line imports this package.
"""
