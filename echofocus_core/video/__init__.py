"""What is a video: decoding, studies, the encoder, extraction, embedding files."""
