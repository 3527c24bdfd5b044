"""How the video encoder is trained."""
