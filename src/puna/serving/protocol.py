"""The requests that the server takes, as pydantic models: a field that is not here is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from puna.serving.refused_fields import HARMLESS, REFUSED

MAX_PROMPTS: Final = 256
MAX_INPUTS: Final = 2048  # OpenAI's
MAX_N: Final = 128
MAX_LOGPROBS: Final = 20
MAX_STOPS: Final = 64
MAX_GUIDE_CHARS: Final = 64 * 1024
MAX_TOOLS: Final = 128
MAX_TEMPLATE_CHARS: Final = 64 * 1024
_GUIDES: Final = ("guided_json", "guided_regex", "guided_grammar", "guided_choice", "structured_outputs")

Name = Annotated[str, Field(min_length=1, max_length=256)]
ModelName = Annotated[str, Field(min_length=1, max_length=4096)]  # may be the path of a folder
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


def _form_of(prompt: Any) -> str | None:
    first = prompt[0] if isinstance(prompt, list) and prompt else ""
    if isinstance(prompt, str):
        return "a text"
    if not isinstance(prompt, list) or isinstance(first, bool):
        return None
    return {str: "a list of texts", int: "token ids", list: "lists of token ids"}.get(type(first))


# Which form a prompt has shows in its first entry. So what is wrong is told of that one, and not of four.
_FORM: Final = Discriminator(
    _form_of,
    custom_error_type="prompt_form",
    custom_error_message="Input should be a text, a list of texts, token ids, or a list of lists of token ids",
)
Text = Annotated[str, Tag("a text")]
Tokens = Annotated[TokenIds, Tag("token ids")]


class Strict(BaseModel):
    """No coercion and no unknown fields: what can't be honoured is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """`continuous_usage_stats`, vLLM's, puts the usage so far into every chunk."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Strict):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and only with it")
        return self


class StructuredOutputs(Strict):
    """vLLM's later form of the guided_* fields: one of these."""

    json_: Annotated[str, Field(max_length=MAX_GUIDE_CHARS)] | dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, Field(max_length=MAX_GUIDE_CHARS)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    grammar: Annotated[str, Field(max_length=MAX_GUIDE_CHARS)] | None = None
    json_object: Literal[True] | None = None

    @field_validator("json_")
    @classmethod
    def _is_small(cls, value: Any) -> Any:
        return _limited(value)

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("structured_outputs takes exactly one of json, regex, choice, grammar and json_object")
        return self


class EngineRequest(Strict):
    """What all requests to the model share. None means that the server's default holds."""

    model: ModelName
    user: Annotated[str, Field(max_length=1024)] | None = None  # a label: it holds without being looked at
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    deadline: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        unset = {name for name, value in data.items() if value is None and name not in cls.model_fields}
        harmless = {name for name, value in HARMLESS if name in data and data[name] == json.loads(value)}
        kept = {name: value for name, value in data.items() if name not in unset | harmless}
        refused = next((name for name in kept if name in REFUSED), None)
        if refused is not None:
            raise ValueError(f"{refused} {REFUSED[refused]}; leave it out")
        return kept

    @property
    def constraints(self) -> list[str]:
        """The fields given that constrain the output; there may be one."""
        return []


class SamplingRequest(EngineRequest):
    """What completions and chat completions share."""

    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # A label, and a hint for a cache of many machines: both hold without being looked at.
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    service_tier: Literal["auto", "default"] | None = None

    # vLLM's extensions
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOPS)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    bad_words: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    guided_json: Annotated[str, Field(max_length=MAX_GUIDE_CHARS)] | dict[str, Any] | None = None
    guided_regex: Annotated[str, Field(max_length=MAX_GUIDE_CHARS)] | None = None
    guided_grammar: Annotated[str, Field(max_length=MAX_GUIDE_CHARS)] | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None

    @field_validator("guided_json")
    @classmethod
    def _is_small(cls, value: Any) -> Any:
        return _limited(value)

    @field_validator("response_format")
    @classmethod
    def _has_small_schema(cls, value: ResponseFormat | None) -> ResponseFormat | None:
        if value is not None and value.json_schema is not None:
            _limited(value.json_schema.schema_)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs can't be streamed: leave out stream or prompt_logprobs")
        return self

    @property
    def constraints(self) -> list[str]:
        """The fields given that constrain the output; there may be one."""
        given = [name for name in _GUIDES if getattr(self, name) is not None]
        form = self.response_format
        return given if form is None or form.type == "text" else [*given, "response_format"]


def _limited(schema: Any) -> Any:
    if len(json.dumps(schema)) > MAX_GUIDE_CHARS:
        raise ValueError(f"the schema has more than {MAX_GUIDE_CHARS} characters")
    return schema


class CompletionRequest(SamplingRequest):
    prompt: Annotated[
        Text
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("a list of texts")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("lists of token ids")],
        _FORM,
    ]
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: None = None
    add_special_tokens: bool | None = None

    @field_validator("suffix", mode="before")
    @classmethod
    def _refuse_suffix(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("this server does not fill in the middle; leave suffix out")

    @model_validator(mode="after")
    def _best_of_holds_n(self) -> CompletionRequest:
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise ValueError(f"best_of is {self.best_of}, less than n, which is {n}")
        if self.stream and self.best_of is not None and self.best_of > n:
            raise ValueError("best_of above n can't be streamed: which texts are best shows at the end")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which asks for nothing unless echo is true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return _several(self.prompt)


def _several(prompts: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or a list of them, as a list."""
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        return [prompts]
    return list(prompts)


class ContentPart(Strict):
    """Of type text, or of an assistant's message that refused."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _has_its_text(self) -> ContentPart:
        if (self.text is None) == (self.type == "text") or (self.refusal is None) == (self.type == "refusal"):
            raise ValueError(f"a part of type {self.type} has the field {self.type}, and no other")
        return self

    @property
    def written(self) -> str:
        return self.text or self.refusal or ""


class FunctionCall(Strict):
    name: Name
    arguments: str
    parsed_arguments: Any = None  # the same once more: openai's client sends what its `parse` gave back as it is


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(min_length=1)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    parsed: Any = None  # the content once more, from the same client
    provider_specific_fields: dict[str, Any] | None = None  # litellm's notes on an answer, which it sends back
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        # Clients send an answer's message back as it came, with its empty fields.
        if isinstance(data, dict):
            return {k: v for k, v in data.items() if not (v is None and k not in cls.model_fields) and v != []}
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for i, part in enumerate(value if isinstance(value, list) else ()):
            if isinstance(part, dict) and part.get("type") not in ("text", "refusal"):
                hint = "; send reasoning as reasoning_content" if part.get("type") in ("thinking", "reasoning") else ""
                raise ValueError(
                    f"part {i} has the type {part.get('type')!r}: this server takes parts of type text{hint}"
                )
        return value

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        thought = self.reasoning_content or self.reasoning
        if self.role != "assistant" and (self.tool_calls or self.refusal or thought):
            raise ValueError("tool_calls, refusal, reasoning_content and reasoning belong to assistant messages")
        if self.reasoning and self.reasoning_content and self.reasoning != self.reasoning_content:
            raise ValueError("reasoning and reasoning_content are two names of one text: give one of them")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool message needs the tool_call_id that it answers")
        if self.role != "tool" and self.tool_call_id is not None:
            raise ValueError("tool_call_id belongs to tool messages")
        if self.role != "assistant" and any(p.type == "refusal" for p in self.content or () if not isinstance(p, str)):
            raise ValueError("content has a refusal, which belongs to assistant messages")
        if self.content is None and not (self.tool_calls or self.refusal or thought):
            raise ValueError("a message needs content")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates of Hugging Face take it: content as one text, arguments as an object."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.written for part in content)
        role = "system" if self.role == "developer" else self.role
        found: dict[str, Any] = {"role": role, "content": "\n".join(filter(None, (content, self.refusal)))}
        for name in ("name", "tool_call_id"):
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        if self.reasoning_content or self.reasoning:
            found["reasoning_content"] = self.reasoning_content or self.reasoning
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return found


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # what a model once wrote need not be JSON


def _of_template(variables: dict[str, Any]) -> dict[str, Any]:
    reserved = next((name for name in ("messages", "tools", "add_generation_prompt") if name in variables), None)
    if reserved is not None:
        raise ValueError(f"{reserved} is a field of its own: give it as that")
    return variables


TemplateVariables = Annotated[dict[str, Any], Field(max_length=32), AfterValidator(_of_template)]


class ChatPrompt(Strict):
    """A conversation and how the model's chat template writes it."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _is_small(cls, value: Any) -> Any:
        return _limited(value)

    @property
    def schema_(self) -> dict[str, Any]:
        """Of the arguments; without parameters there are none."""
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class ChosenTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: ChosenTools


class ChatRequest(SamplingRequest, ChatPrompt):
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=MAX_TEMPLATE_CHARS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _chat_fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens is 0: ask for at least one token")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def named_tool(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def allowed_tools(self) -> tuple[str, ...] | None:
        """The names of those that the model may choose from; None for all."""
        if not isinstance(self.tool_choice, AllowedTools):
            return None
        return tuple(tool.function.name for tool in self.tool_choice.allowed_tools.tools)

    @property
    def forces_tools(self) -> bool:
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required" or self.named_tool is not None


class EmbeddingRequest(EngineRequest):
    input: Annotated[
        Text
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS), Tag("a list of texts")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS), Tag("lists of token ids")],
        _FORM,
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None
    # vLLM's extensions; -1 means as many as the context holds.
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | Literal[-1] | None = None
    add_special_tokens: bool | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return _several(self.input)


class TokenizeRequest(Strict):
    """A prompt, or messages."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _is_one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    model: ModelName | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
