"""Videos into clip embeddings: the PanEcho encoder, the extraction, the embedding files."""

EMBED_DIM = 768  # numbers in a clip embedding
