"""One rank, one step: the paged cache and the tensors that a step plan turns into."""
