"""OpenVINO GenAI, which reads the GGUF file itself; one sequence at a time."""

from __future__ import annotations

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
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        metrics = self._pipeline.generate(openvino.Tensor(np.array(prompts, dtype=np.int64)), config).perf_metrics
        step = metrics.get_tpot().mean if new_tokens > 1 else 0.0
        return metrics.get_ttft().mean / 1000, step / 1000

    def score(self, tokens: Sequence[int]) -> None:
        return None


if __name__ == "__main__":
    serve(OpenVino)
