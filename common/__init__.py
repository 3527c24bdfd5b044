"""The ground floor: what every room stands on. It imports nothing of ours."""

__version__ = "0.1.0"
EMBED_DIM = 768  # numbers of a clip embedding, and of a study embedding
