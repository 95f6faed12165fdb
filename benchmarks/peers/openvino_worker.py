"""OpenVINO GenAI, which reads the GGUF file itself; one sequence at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import serve


class OpenVino:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._pipeline = openvino_genai.LLMPipeline(
            settings["file"], "CPU", INFERENCE_NUM_THREADS=settings["threads"], PERFORMANCE_HINT="LATENCY"
        )

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        if len(prompts) > 1:
            raise ValueError("only one sequence at a time is measured here")
        arrivals: list[float] = []
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False

        class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
            def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
                arrivals.extend([time.perf_counter()] * (1 if isinstance(token, int) else len(token)))
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        start = time.perf_counter()
        self._pipeline.generate(openvino.Tensor(np.array(prompts, dtype=np.int64)), config, Streamer())
        return arrivals[0] - start, (arrivals[-1] - arrivals[0]) / max(1, len(arrivals) - 1)

    def score(self, tokens: Sequence[int]) -> None:
        return None


if __name__ == "__main__":
    serve(OpenVino)
