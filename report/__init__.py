"""What a person looks at: statistics, figures, pages, the demo."""
