"""Inference with a trained model: predictors, video, export, the Hugging Face Hub."""
