"""Everything below the command line of EchoFocus."""

__version__ = "0.1.0"
EMBED_DIM = 768  # features of a clip embedding and of a study embedding
