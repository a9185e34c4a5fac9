"""A trained model at work: predictors, video, export, cost."""
