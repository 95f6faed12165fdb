"""From a request's fields to SamplingParams: over what the checkpoint recommends, one constraint at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from puna.config import GenerationConfig
from puna.scheduling.sampling_params import GuidedDecoding, ReasoningMarks, SamplingParams
from puna.serving.errors import ApiError, bad_request
from puna.serving.generation import refusal
from puna.serving.protocol import SamplingRequest

_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SAME_NAMES = (
    *_RECOMMENDED,
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "stop_token_ids",
    "min_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
)


def sampling_params(
    request: SamplingRequest,
    recommended: GenerationConfig,
    *,
    n: int,
    max_tokens: int | None,
    logprobs: int | None,
    guided: GuidedDecoding | None = None,
    reasoning: ReasoningMarks | None = None,
    **overrides: Any,
) -> SamplingParams:
    """Raises ApiError for values that can't be. `guided` is a constraint that does not come from the request's fields;
    `reasoning` may come before what any of them constrains. Greedy texts are all the same, so there n is 1: whoever
    asked for more shows the one more often.

    What the request leaves out is as generation_config.json recommends, where that says `do_sample`; else temperature
    1, as OpenAI has it.
    """
    chosen: dict[str, Any] = {}
    if recommended.do_sample:
        chosen = {name: getattr(recommended, name) for name in _RECOMMENDED}
    for name in _SAME_NAMES:
        value = getattr(request, name)
        if value is not None:
            chosen[name] = value
    if request.logit_bias:
        chosen["logit_bias"] = _logit_bias(request.logit_bias)
    chosen |= overrides
    asked = guided_decoding(request)
    if guided is not None and asked is not None:
        field = request.constraints[0]
        raise bad_request(f"tools and tool_choice constrain the output already: leave out {field}", field)
    constraint = guided or asked
    if constraint is not None and reasoning is not None:
        constraint = replace(constraint, reasoning=reasoning)
    if chosen.get("temperature") == 0:
        n = 1
    try:
        return SamplingParams(n=n, max_tokens=max_tokens, logprobs=logprobs, guided=constraint, **chosen)
    except ValueError as error:
        raise refusal(error) from None


def guided_decoding(request: SamplingRequest) -> GuidedDecoding | None:
    """The constraint that the fields ask for. Raises ApiError where there are two."""
    given, form = request.constraints, request.response_format
    if len(given) > 1:
        raise bad_request(f"{' and '.join(given)} both constrain the output: give one", given[0])
    try:
        if request.guided_json is not None:
            return GuidedDecoding(json_schema=request.guided_json)
        if request.guided_regex is not None:
            return GuidedDecoding(regex=request.guided_regex)
        if request.guided_grammar is not None:
            return GuidedDecoding(grammar=request.guided_grammar)
        if request.guided_choice is not None:
            return GuidedDecoding(choice=request.guided_choice)
        if request.structured_outputs is not None:
            other = request.structured_outputs
            return GuidedDecoding(
                json_schema=other.json_,
                regex=other.regex,
                choice=other.choice,
                grammar=other.grammar,
                json_object=bool(other.json_object),
            )
        if form is not None and form.json_schema is not None:
            return GuidedDecoding(json_schema=form.json_schema.schema_)
        if form is not None and form.type == "json_object":
            return GuidedDecoding(json_object=True)
    except ValueError as error:
        raise bad_request(str(error), given[0]) from None
    return None


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    wrong: ApiError | None = None
    found: dict[int, float] = {}
    for key, value in given.items():
        if key.isascii() and key.isdigit() and len(key) <= 10:
            found[int(key)] = value
        else:
            wrong = wrong or bad_request(f"logit_bias has the key {key!r}: keys are token ids", "logit_bias")
    if wrong is not None:
        raise wrong
    return found
