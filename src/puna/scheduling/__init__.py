"""What runs when: ids, counts and blocks, in plain Python. Nothing in this folder knows torch."""
