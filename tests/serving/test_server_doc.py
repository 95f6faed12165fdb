"""docs/server.md has every endpoint, field, limit, flag, error code and metric of the server, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args

import pytest
from pydantic import BaseModel

from puna.serving import protocol
from puna.serving.app import make_app
from puna.serving.record import UNENFORCEABLE, RequestRecord
from puna.serving.refused_fields import REFUSED
from puna.serving.state import Phase, ServerSettings, ServerState
from serving.test_metrics import EXPORTED

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
SOURCES: Final = sorted((ROOT / "src" / "puna" / "serving").glob("*.py"))
FLAGS: Final = (ROOT / "tests" / "cli_flags.txt").read_text(encoding="utf-8").splitlines()

SHARED: Final = protocol.SamplingRequest
# By the heading above their tables, with what an earlier table has told.
MODELS: Final[dict[str, tuple[list[type[BaseModel]], type[BaseModel] | None]]] = {
    "Of both kinds of completions": ([SHARED], None),
    "Of completions": ([protocol.CompletionRequest], SHARED),
    "Of chat completions": ([protocol.ChatRequest], SHARED),
    "Of embeddings": ([protocol.EmbeddingRequest], None),
    "Of /tokenize and /detokenize": ([protocol.TokenizeRequest, protocol.DetokenizeRequest], None),
}
# In the order of their table.
OBJECTS: Final[tuple[type[BaseModel], ...]] = (
    protocol.StreamOptions,
    protocol.ResponseFormat,
    protocol.JsonSchema,
    protocol.StructuredOutputs,
    protocol.Message,
    protocol.ContentPart,
    protocol.ToolCall,
    protocol.FunctionCall,
    protocol.Tool,
    protocol.Function,
    protocol.NamedTool,
    protocol.FunctionName,
    protocol.AllowedTools,
    protocol.ChosenTools,
)
FAR: Final = 2**31  # bounds beyond it are those of a type, which the document calls by their bits


def section(heading: str) -> str:
    """From a heading to the next of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", TEXT, re.M | re.S)
    assert found, heading
    return found[1]


def rows(heading: str) -> list[list[str]]:
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r" \|(?= )", line.strip("|"))] for line in lines]
    return [row for before, row in zip([None, *cells], cells, strict=False) if before and not row[0].startswith("---")]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def table(heading: str) -> dict[str, str]:
    """The names in the first cells of a section's tables, each with the rest of its row."""
    found: dict[str, str] = {}
    for first, *rest in rows(heading):
        for name in quoted(first):
            assert name not in found, f"{name} stands twice under {heading}"
            found[name] = " | ".join(rest)
    return found


def named(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize("heading", list(MODELS))
def test_fields(heading: str) -> None:
    models, before = MODELS[heading]
    known = set() if before is None else named(before)
    if heading == "Of chat completions":
        known -= {"logprobs"}
    assert set(table(heading)) == set.union(*map(named, models)) - known


def test_fields_of_objects() -> None:
    found = rows("Of the objects within")
    assert len(found) == len(OBJECTS)
    for (_, told), model in zip(found, OBJECTS, strict=True):
        assert set(quoted(told)) - {"_", "-", "."} == named(model), model


def test_every_model_of_a_request_is_told() -> None:
    kinds = [kind for kind in vars(protocol).values() if isinstance(kind, type) and issubclass(kind, protocol.Strict)]
    shared = {protocol.Strict, protocol.EngineRequest, protocol.ChatPrompt}  # whose fields others have
    assert set(kinds) - shared == {*OBJECTS, *(model for models, _ in MODELS.values() for model in models)}


def bounds(schema: dict[str, Any]) -> Iterator[float]:
    """Those of a value; not of what is within it."""
    words = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
    for kind in schema.get("anyOf", [schema]):
        yield from (kind[word] for word in words if word in kind)


def tells(text: str, bound: float) -> bool:
    if abs(bound) >= FAR:
        return f"{int(abs(bound)).bit_length()} bits" in text
    spellings = [f"{bound:g}", f"{int(bound):,}"]
    if bound and bound % 1024 == 0:
        spellings.append(f"{int(bound) // 1024} Ki")
    return any(re.search(rf"(?<!\d)(?<!\d[.,]){re.escape(word)}(?!\d)", text) for word in spellings)


@pytest.mark.parametrize("heading", list(MODELS))
def test_limits(heading: str) -> None:
    told = table(heading)
    for model in MODELS[heading][0]:
        for name, schema in model.model_json_schema()["properties"].items():
            # Names and numbers of which one alone is right need no bounds.
            if name in told and name not in ("model", "dimensions") and told[name] != "as above":
                missing = [bound for bound in bounds(schema) if not tells(told[name], bound)]
                assert missing == [], f"{name}: {told[name]!r}"


def test_limits_of_requests() -> None:
    (told,) = re.findall(r"^Limits: (256 texts.*?)\n\n", TEXT, re.M | re.S)
    told = " ".join(told.split())
    assert f"{protocol.MAX_PROMPTS} texts in one request ({protocol.MAX_INPUTS:,} inputs of embeddings)" in told
    assert f"n {protocol.MAX_N}, {protocol.MAX_LOGPROBS} log-probabilities, {protocol.MAX_STOPS} stop strings" in told
    assert f"{protocol.MAX_TOOLS} tools, {protocol.MAX_GUIDE_CHARS // 1024} Ki characters of a schema" in told
    assert protocol.MAX_TEMPLATE_CHARS == protocol.MAX_GUIDE_CHARS


def test_refused_fields() -> None:
    words = set(quoted(section("Refused")))
    assert set(REFUSED) - words == set()


def test_endpoints() -> None:
    routes = make_app(ServerState(ServerSettings(model_name="small"))).routes
    served = {
        f"{method} {re.sub(':path', '', route.path)}"  # type: ignore[attr-defined]
        for route in routes
        for method in (getattr(route, "methods", None) or {"GET"}) - {"HEAD"}
    }
    pages = {name for name in served if name.startswith("GET /page/")}
    assert pages
    assert set(table("Endpoints")) == served - pages


def test_flags() -> None:
    frozen = {}
    for line in FLAGS:
        found = re.fullmatch(r"puna serve (--\S+) (.+?)(?: = (.*))?", line)
        if found:
            frozen[found[1].split("/")[0]] = found[3]
    told: dict[str, str] = {}
    for first, default, _ in rows("Flags"):
        names = [name for name in quoted(first) if name != "-m"]
        defaults = default.split(", ") if len(names) > 1 else [default]
        told |= dict(zip(names, [*defaults, *[defaults[-1]] * len(names)], strict=False))
    assert set(told) == set(frozen)
    for name, default in frozen.items():
        if default is not None:
            assert told[name] == {"False": "off"}.get(default, default.removesuffix(".0")), name


def test_every_flag_that_is_mentioned_is_one() -> None:
    flags = {name for line in FLAGS for name in re.findall(r"^puna (?:bench )?serve (--[a-z-]+)", line)}
    flags |= {name for line in FLAGS for name in re.findall(r"/(--no-[a-z-]+)", line)}
    others = {"--fail-with-body", "--tasks", "--model"}  # of curl and of lm_eval
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![\w])", TEXT)) - flags - others == set()


def test_codes_and_statuses_of_errors() -> None:
    codes: set[str] = set()
    statuses = {404, 405}  # the framework's own
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ApiError":
                statuses |= {one.value for one in node.args[:1] if isinstance(one, ast.Constant)}
            if isinstance(node, ast.keyword) and node.arg == "code":
                parts = list(ast.walk(node.value))
                codes |= {one.value for one in parts if isinstance(one, ast.Constant) and one.value}
                codes |= {UNENFORCEABLE for one in parts if isinstance(one, ast.Name) and one.id == "UNENFORCEABLE"}
    assert "engine_" in codes  # and the phase of a server that is not ready
    codes = codes - {"engine_"} | {f"engine_{phase}" for phase in get_args(Phase) if phase != "ready"}
    told = rows("Errors")
    assert {code for _, code, _ in told for code in quoted(code)} == codes
    assert {int(status) for status, _, _ in told} == statuses


def test_types_of_errors() -> None:
    rest = {code: words for _, codes, words in rows("Errors") for code in quoted(codes)}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ApiError":
                given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
                code, kind = given.get("code"), given.get("kind")
                words = re.findall(r"\b(\w+_error|service_unavailable)\b", rest.get(str(code), ""))
                if code is not None:
                    assert words == ([] if kind is None else [kind]), code


def test_metrics() -> None:
    exported = {f"{name}_total" if kind == "counter" else name for name, kind in EXPORTED.items()}
    ours = {name for name in exported if not name.startswith("process_")}
    assert set(table("Metrics")) == ours | {"process_*"}
    kinds = {name: told.partition(" | ")[0] for name, told in table("Metrics").items()}
    for name, kind in EXPORTED.items():
        if not name.startswith("process_"):
            assert kinds[f"{name}_total" if kind == "counter" else name] == kind


def test_fields_of_logs() -> None:
    record = RequestRecord(request_id="x", model="m", error="e")
    words = set(quoted(section("Logs")))
    assert set(record.fields()) - {"request_id", "model"} <= words  # which are told in words


def test_links_within() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, re.M)
    places = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) - places == set()
    for file in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT):
        assert (ROOT / "docs" / file).exists(), file
