"""What a model needs, worked out from its config alone: nothing here loads weights or imports torch."""
