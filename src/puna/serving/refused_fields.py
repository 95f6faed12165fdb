"""Fields that clients know and this server does not honour: what it says of them, and values that ask for nothing."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

# Values, as JSON, that ask for nothing more than this server does. They may be sent; so may null, in any field.
HARMLESS: Final = (
    ("store", "false"),
    ("metadata", "{}"),
    ("modalities", '["text"]'),
    ("verbosity", '"medium"'),
    ("prompt_cache_retention", '"in_memory"'),
    ("prompt_cache_options", '{"mode": "implicit"}'),
    ("use_beam_search", "false"),
    ("length_penalty", "1.0"),
    ("spaces_between_special_tokens", "true"),
)
# Behind the field's name, and before what to do: to leave it out.
REFUSED: Final = MappingProxyType(
    {
        "audio": "asks for speech, and this server writes text",
        "modalities": "can only be ['text'] here",
        "prediction": "would have no effect: this server does not check guesses",
        "store": "can't be true: this server keeps no answers",
        "metadata": "belongs to stored answers, and this server keeps none",
        "moderation": "is not done here",
        "verbosity": "can only be medium here: say in the prompt how long the answer is to be",
        "web_search_options": "asks for a search of the web, which this server does not do",
        "functions": "is OpenAI's old field: give tools instead",
        "function_call": "is OpenAI's old field: give tool_choice instead",
        "prompt_cache_retention": "can only be in_memory here",
        "prompt_cache_options": "can only have the mode implicit here",
        "use_beam_search": "can't be true here",
        "length_penalty": "belongs to beam search, which is not served",
        "spaces_between_special_tokens": "can only be true here",
    }
)
