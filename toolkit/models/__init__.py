"""The bundled generator glyphs-32: where its files are and which classes it draws."""
