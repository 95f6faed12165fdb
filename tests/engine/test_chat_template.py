"""Chat templates: rendered text and ids equal transformers' apply_chat_template; the sandbox; refusals."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
import transformers

from puna.engine.chat_template import ChatTemplate
from puna.engine.tokenizer import Tokenizer

SaveTokenizer = Callable[..., Path]

# Written for these tests, with the features that the templates of each family use.
LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
    {% set system = '<<RULES>>\\n' + messages[0]['content'] + '\\n<</RULES>>\\n\\n' %}
{% else %}
    {% set rest = messages %}
    {% set system = '' %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must take turns, starting with the user') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + message['content'].strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""

LLAMA_3_1 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- macro header(role) %}{{ '<|header|>' + role + '<|/header|>\\n\\n' }}{% endmacro %}
{%- set ns = namespace(system='', start=0) %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content | trim %}
    {%- set ns.start = 1 %}
{%- endif %}
{{- header('system') }}
{%- if tools is not none %}
    {{- 'Functions, as JSON:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + '\\n' }}
    {%- endfor %}
{%- endif %}
{{- 'Today: ' + date_string + '\\n' + ns.system + '<|end|>' }}
{%- for message in messages[ns.start:] %}
    {%- if message.role == 'tool' %}
        {{- header('ipython') }}
        {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('One call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}' }}
    {%- else %}
        {{- header(message.role) }}
        {%- generation %}{{- message.content | trim }}{%- endgeneration %}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}
"""

LLAMA_3_2 = """\
{{- bos_token }}
{#- blocks of text and pictures -#}
{%- for message in messages %}
    {{- '<|header|>' ~ message['role'] ~ '<|/header|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for block in message['content'] %}
            {%- if block['type'] == 'image' %}{{- '<image>' }}{%- continue %}{%- endif %}
            {{- block['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|end|>' }}
    {%- if loop.index > 20 %}{%- break %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages if message.role != 'system' %}
    {%- if loop.first %}{{- bos_token }}{%- endif %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[TOOLS] [' }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": ' }}
                {%- for key, value in tool.function.items() if key != 'return' %}
                    {{- ', ' if not loop.first }}{{- '"' + key + '": ' + value | tojson }}
                {%- endfor %}
                {{- '}}' + (', ' if not loop.last else ']') }}
            {%- endfor %}
            {{- '[/TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[CALLS] ' + (message.tool_calls | map(attribute='function') | list | tojson) + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[RESULT] ' + {'content': message.content} | tojson(sort_keys=true, ensure_ascii=true) }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools> answer with <tool_call>{...}</tool_call><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and tools %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
    {%- if message.content %}{{- message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
        {{- '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
{%- endif %}
"""

TEMPLATES = {"llama 2": LLAMA_2, "llama 3.1": LLAMA_3_1, "llama 3.2": LLAMA_3_2, "mistral": MISTRAL, "chatml": CHATML}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Le temps qu'il fait <à> Zürich & 東京",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "date", "parameters": {"type": "object", "properties": {}}}},
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "one message": [{"role": "user", "content": "Hi <there> & \"you\" 'é' 👩‍👧"}],
    "system and turns": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "the llama \n"},
        {"role": "assistant", "content": " walked  "},
        {"role": "user", "content": "over the hill?"},
    ],
    "a call": [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": "sunny ☀"},
        {"role": "assistant", "content": "Sunny.", "reasoning": "easy"},
    ],
    "blocks": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
}
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": "<|end|>",
}


def outcome(render: Callable[..., str], *args: Any, **options: Any) -> str:
    """The text, or that the template refused; the two libraries raise different exceptions."""
    try:
        return render(*args, **options)
    except (ValueError, jinja2.TemplateError, TypeError):
        return "refused"


@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name: str, byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    folder = save_tokenizer(byte_level, {**CONFIG, "chat_template": TEMPLATES[name]})
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    num_rendered = 0
    for messages in CHATS.values():
        for tools in (None, TOOLS):
            for prompt in (True, False):
                for variables in ({}, {"date_string": "1 Apr 2024", "enable_thinking": False, "bos_token": "<s>"}):
                    options = {"tools": tools, "add_generation_prompt": prompt}
                    expected = outcome(theirs.apply_chat_template, messages, tokenize=False, **options, **variables)
                    text = outcome(ours.render_chat, messages, template_variables=variables, **options)
                    assert text == expected
                    if expected == "refused":
                        continue
                    num_rendered += 1
                    ids = theirs.apply_chat_template(messages, return_dict=False, **options, **variables)
                    assert ours.encode_chat(messages, template_variables=variables, **options) == ids
    assert num_rendered >= 8


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("final", ["The answer", " The answer is ", "x"])
def test_continued_messages_equal_transformers(
    name: str, final: str, byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer
) -> None:
    folder = save_tokenizer(byte_level, {**CONFIG, "chat_template": TEMPLATES[name]})
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": final}]
    text = ours.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text.rstrip().endswith(final.strip())
    assert messages[1]["content"] == final


def test_no_double_bos(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    for template, count in ((LLAMA_3_1, 1), (CHATML, 0)):
        tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_level, {**CONFIG, "chat_template": template}))
        ids = tokenizer.encode_chat(CHATS["one message"])
        assert ids.count(tokenizer.bos_token_id) == count
    text = "<|begin|>" + "the"
    assert tokenizer.encode(text, parse_special=True).count(tokenizer.bos_token_id) == 1


def test_files_and_named_templates(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    messages = CHATS["one message"]
    folder = save_tokenizer(byte_level, {**CONFIG, "chat_template": named})
    cases = [(folder, "plain", "tools")]
    folder = save_tokenizer(byte_level, {**CONFIG, "chat_template": named}, chat_template="file {{ bos_token }}")
    cases.append((folder, "file <|begin|>", "file <|begin|>"))
    folder = save_tokenizer(byte_level, CONFIG, chat_template="file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("file for tools")
    cases.append((folder, "file", "file for tools"))
    for folder, without_tools, with_tools in cases:
        ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert ours.render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False) == without_tools
        with_theirs = theirs.apply_chat_template(messages, tools=TOOLS, tokenize=False)
        assert ours.render_chat(messages, tools=TOOLS) == with_theirs == with_tools


def test_strftime_now_is_today() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    text = render("{{ strftime_now('%Y-%m-%d') }}")
    assert text in (before, datetime.now().strftime("%Y-%m-%d"))


def render(source: str, **options: Any) -> str:
    messages = options.pop("messages", [{"role": "user", "content": "Hi"}])
    return ChatTemplate({"default": source}, {"bos_token": "<s>"}).render(messages, **options)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].clear() }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ 'x' * 100000000 }}",
        "{{ [0] * 100000000 }}",
        "{{ 10 ** 1000000000 }}",
        "{{ '%0999999999d' % 1 }}",
        "{% for i in range(90000) %}{{ 'xxxxxxxxxx' * 100 }}{% endfor %}",
        "{{ lipsum() }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_the_sandbox_refuses(source: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="the chat template"):
        render(source, messages=messages)
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% set c = b %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    ],
)
def test_work_without_end_is_cut_off(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.engine.chat_template._MAX_SECONDS", 0.05)
    with pytest.raises(ValueError, match="more than"):
        render(source, messages=[{"role": "user", "content": "Hi"}])


def test_loops_that_are_watched_know_their_place() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    each = "{{ m.content }}{{ loop.index }}/{{ loop.length }}{{ loop.revindex }}{{ loop.last }}{{ loop.nextitem }},"
    expected = f"a1/22False{messages[1]},b2/21True,"
    for values in ("messages", "messages | selectattr('role')"):
        assert render(f"{{% for m in {values} %}}{each}{{% endfor %}}", messages=messages) == expected
    assert render("{% for x in nothing %}x{% else %}none{% endfor %}", messages=messages) == "none"


def test_the_templates_own_refusal_is_the_message() -> None:
    with pytest.raises(ValueError, match="no system here"):
        render("{{ raise_exception('no system here') }}")


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% for x in y %}", "{% nothing %}"])
def test_templates_that_do_not_compile(
    source: str, byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer
) -> None:
    folder = save_tokenizer(byte_level, CONFIG, chat_template=source)
    with pytest.raises(ValueError, match="the chat template 'default' does not compile: line 1") as error:
        Tokenizer.from_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": "Hi"}, "list of at least one message"),
        ({"messages": ["Hi"]}, "must be a dict"),
        ({"messages": [{"role": "user", "content": object()}]}, "JSON values"),
        ({"tools": [print]}, "JSON schemas"),
        ({"continue_final_message": True}, "add_generation_prompt=False"),
        ({"template_variables": {"messages": []}}, "'messages'"),
        ({"template_variables": {"f": print}}, "JSON values"),
    ],
)
def test_malformed_conversations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render("{{ messages[0].content }}", **options)


def test_a_final_message_that_is_not_rendered() -> None:
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(ValueError, match="leaves out"):
        render("{{ messages[0].content[:1] }}", **continued)
    with pytest.raises(ValueError, match="does not use the content"):
        render("{{ messages[0].text }}", **continued)
    with pytest.raises(ValueError, match="no text"):
        render("{{ messages[0].content }}", messages=[{"role": "user"}], **continued)


def test_a_folder_without_chat_template(byte_level: tokenizers.Tokenizer, save_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer.from_pretrained(save_tokenizer(byte_level, CONFIG))
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match=r"no chat template; give the prompt as text, or add a chat_template\.jinja"):
        tokenizer.render_chat(CHATS["one message"])
