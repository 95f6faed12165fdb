"""llama.cpp through llama-cpp-python's low-level calls: llama_decode on batches, as llama-bench makes them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as lib
import numpy as np
from protocol import serve


class LlamaCpp:
    """Tokens after the prompt are random ones too, as in llama-bench: nothing is sampled."""

    def __init__(self, settings: dict[str, Any]) -> None:
        lib.llama_log_set(_QUIET, None)
        lib.llama_backend_init()
        model_params = lib.llama_model_default_params()
        model_params.use_extra_bufts = settings.get("repack", True)
        model = lib.llama_model_load_from_file(settings["file"].encode(), model_params)
        if model is None:
            raise ValueError(f"llama.cpp can't load {settings['file']}")
        batch, context = settings["batch"], settings["context"]
        params = lib.llama_context_default_params()
        params.n_ctx = batch * context
        params.n_batch, params.n_ubatch = max(2048, batch), settings.get("ubatch", 512)
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.flash_attn_type = 1 if settings.get("flash_attention", True) else 0
        params.kv_unified = settings.get("unified", False)
        params.no_perf = True
        self._context = lib.llama_init_from_model(model, params)
        if self._context is None:
            raise ValueError("llama.cpp can't make the context")
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)
        self._capacity = params.n_batch
        self._vocab_size = settings["vocab_size"]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        start = time.perf_counter()
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for first in range(0, len(rows), self._capacity):
            self._decode(rows[first : first + self._capacity])
        middle = time.perf_counter()
        for step in range(new_tokens - 1):
            self._decode(
                [(prompt[step % len(prompt)], len(prompt) + step, i, True) for i, prompt in enumerate(prompts)]
            )
        return middle - start, (time.perf_counter() - middle) / max(1, new_tokens - 1)

    def score(self, tokens: Sequence[int]) -> list[float]:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        self._decode([(token, position, 0, True) for position, token in enumerate(tokens)])
        found = []
        for position, following in enumerate(tokens[1:]):
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, position), (self._vocab_size,))
            shifted = logits.astype(np.float64) - logits.max()
            found.append(float(shifted[following] - np.log(np.exp(shifted).sum())))
        return found

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wants_logits
        failed = lib.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        lib.llama_synchronize(self._context)


@lib.llama_log_callback
def _QUIET(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


if __name__ == "__main__":
    serve(LlamaCpp)
