"""The ground floor: what every room stands on. It imports nothing of ours."""

__version__ = "0.1.0"
