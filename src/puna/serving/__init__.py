"""The OpenAI-compatible server: requests and answers, streams, keys, metrics. Needs the extra `serve`."""
