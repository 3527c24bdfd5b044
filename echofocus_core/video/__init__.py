"""Videos: decoding, studies, the encoder, extraction, embedding files."""
