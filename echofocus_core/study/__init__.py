"""What is a study: config, labels, folds, the study-level model, training and answers."""
