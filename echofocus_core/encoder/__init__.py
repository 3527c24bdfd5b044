"""Training of the video encoder."""
