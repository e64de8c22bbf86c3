"""bittern: few-bit diffusion models."""

__version__ = "0.1.0"
