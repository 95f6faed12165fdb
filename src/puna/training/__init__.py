"""The small trainer: tokenizer, data, optimiser steps and checkpoints for one LLaMA on one or several processes."""
