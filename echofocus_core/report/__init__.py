"""Output for readers: pages, figures, tables."""
