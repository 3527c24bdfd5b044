"""Studies: config, labels, folds, the study-level model, training and answers."""
