"""The engine: text in and out of token ids, and (later) the request loop over scheduling and runtime."""
