"""The blocks that models are made of. Each knows its shard of the weights and calls ops; none knows the runtime."""
