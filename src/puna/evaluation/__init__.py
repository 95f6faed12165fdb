"""Evaluation: how well a model predicts texts, and how far two models' predictions are apart."""
