"""Videos into clip embeddings: the PanEcho encoder, the extraction, the embedding files."""

from common import EMBED_DIM

__all__ = ["EMBED_DIM"]
