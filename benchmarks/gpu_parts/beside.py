"""transformers on the same shape in the same run: static cache with torch.compile, and its continuous batching."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_parts.runs import Setting, prompts_of


@contextmanager
def transformers_model(setting: Setting) -> Iterator[Any]:
    """A LlamaForCausalLM in bfloat16 whose weights are made on the device; its buffers are computed anew there."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = dict(setting.config.to_hugging_face())
    config = transformers.LlamaConfig(**{key: value for key, value in fields.items() if key != "architectures"})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=setting.device)
    with setting.device:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    model.eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=1
    )
    try:
        yield model
    finally:
        del model
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def synchronized(setting: Setting) -> float:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def static_cache(setting: Setting, model: Any, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """`generate` with a static cache, which transformers compiles by itself on GPUs; prefill apart from decoding."""
    ids = torch.tensor(prompts_of(setting, batch, prompt_tokens), device=setting.device)

    def seconds(count: int) -> float:
        start = synchronized(setting)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=count,
                max_new_tokens=count,
                cache_implementation="static",
            )
        if out.shape[1] != prompt_tokens + count:
            raise RuntimeError(f"{out.shape[1] - prompt_tokens} tokens came, not {count}")
        return synchronized(setting) - start

    compiling = seconds(new_tokens) + seconds(1)
    repeats = range(1 if setting.is_dry else 3)
    first = statistics.median(seconds(1) for _ in repeats)
    whole = statistics.median(seconds(new_tokens) for _ in repeats)
    return {
        "what": f"static cache, compiled; batch {batch}, {prompt_tokens}/{new_tokens}",
        "seconds_to_warm_up": compiling,
        "seconds_to_first_token": first,
        "tokens_per_second": batch * (new_tokens - 1) / max(whole - first, 1e-9),
    }


def continuous_batching(
    setting: Setting, model: Any, count: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Raises RuntimeError where the installed transformers has none."""
    if not hasattr(model, "generate_batch"):
        raise RuntimeError("this transformers has no continuous batching")
    import transformers

    prompts = prompts_of(setting, count, prompt_tokens)
    config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, bos_token_id=1, max_new_tokens=new_tokens
    )

    # Else each call captures its graphs anew; what is kept has the size of the first call's requests.
    keeps = hasattr(model, "destroy_cached_continuous_batching_manager")
    more = {"persistent_manager": True} if keeps else {}

    def run(some: list[list[int]]) -> tuple[float, int]:
        start = synchronized(setting)
        found = model.generate_batch(inputs=some, generation_config=config, **more)
        tokens = sum(len(one.generated_tokens) for one in found.values())
        return synchronized(setting) - start, tokens

    try:
        run(prompts if keeps else prompts[: max(1, count // 16)])
        seconds, tokens = run(prompts)
    finally:
        if keeps:  # it has most of the device's memory
            model.destroy_cached_continuous_batching_manager()
    return {
        "what": f"continuous batching; {count} requests of {prompt_tokens}/{new_tokens}",
        "requests": count,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def beside(setting: Setting, time_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """One result after another; what fails says why, and the rest goes on."""
    short, new = setting.tokens(128), setting.tokens(256)
    with transformers_model(setting) as model:
        for run in (
            lambda: continuous_batching(setting, model, 1000, short, setting.tokens(128)),
            lambda: static_cache(setting, model, 1, short, new),
            lambda: static_cache(setting, model, 1, setting.tokens(8192), setting.tokens(32)),
        )[setting.is_dry :]:  # continuous batching takes a minute for anything on a CPU
            if time_left() < 90 and not setting.is_dry:
                yield {"skipped": f"{time_left():.0f} s left"}
                continue
            try:
                yield run()
            except Exception as error:  # whatever another library raises
                yield {"failed": f"{type(error).__name__}: {error}"[:500]}
