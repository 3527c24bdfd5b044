"""Videos into clip embeddings: the PanEcho encoder and the extraction scripts."""

__version__ = "0.1.0"
