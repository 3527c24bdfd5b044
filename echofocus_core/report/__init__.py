"""What a person sees: pages, figures, tables."""
