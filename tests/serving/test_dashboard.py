"""docs/grafana/puna.json: what Grafana needs of it, and no query for what the server does not export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.conftest import Running

BOARD: Final[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "docs" / "grafana" / "puna.json").read_text(encoding="utf-8")
)
PANELS: Final = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS: Final = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES: Final = {variable["name"]: variable for variable in BOARD["templating"]["list"]}

# An expression is made of these, and of names with their selectors.
WORDS: Final = frozenset(
    ["sum", "max", "by", "rate", "histogram_quantile", "le", "finished_reason", "handler", "status"]
)
SELECTOR: Final = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")


@pytest.fixture(scope="module")
def exported(server: Running) -> dict[str, set[str]]:
    """The names of all samples, with their labels."""
    body = {"model": "small", "prompt": "x", "max_tokens": 2, "ignore_eos": True}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_it_can_be_imported() -> None:
    assert re.fullmatch(r"[\w-]{1,40}", BOARD["uid"])
    assert BOARD["title"]
    assert BOARD["schemaVersion"] >= 30
    assert BOARD.get("id") is None  # Grafana gives its own
    assert "__inputs" not in BOARD  # the data source is a variable: nothing is asked at the import
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_panels_have_a_place_a_unit_and_the_chosen_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + k) for i in range(place["w"]) for k in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["description"]
        for target in (panel, *panel["targets"]):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_query_is_for_what_is_exported(expression: str, exported: dict[str, set[str]]) -> None:
    selectors = SELECTOR.findall(expression)
    assert selectors
    for name, labels in selectors:
        assert name in exported, name
        asked = set(re.findall(r"(\w+)=~", labels))
        assert asked == ({"model_name", "job"} if name.startswith("vllm:") else {"job"})
        assert asked - {"job"} <= exported[name]  # the job is Prometheus' own
        assert all(variable in VARIABLES for variable in re.findall(r"\$(\w+)", labels))
    for words in re.findall(r"by \(([^)]*)\)", expression):
        assert all(word.strip() in exported[selectors[0][0]] for word in words.split(","))
    rest = SELECTOR.sub("", expression).replace("[$__rate_interval]", "")
    assert set(re.findall(r"[a-zA-Z_]\w*", rest)) <= WORDS
    assert re.fullmatch(r"[\w\s().,/]*", rest)
    assert rest.count("(") == rest.count(")")
    # Rates are of what only grows, and a bare value of what goes up and down.
    for name, _ in selectors:
        grows = name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert grows == (f"rate({name}" in expression), name


def test_the_variables_ask_for_what_is_exported(exported: dict[str, set[str]]) -> None:
    for name in ("model_name", "job"):
        found = re.fullmatch(r"label_values\(([\w:]+)(\{.*\})?, (\w+)\)", VARIABLES[name]["query"]["query"])
        assert found
        assert found[1] in exported
        assert found[3] == name


def test_what_matters_is_shown() -> None:
    text = " ".join(EXPRESSIONS)
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "prompt_tokens_total",
        "generation_tokens_total",
        "kv_cache_usage_perc",
        "prefix_cache_hits_total",
        "num_preemptions_total",
    ):
        assert f"vllm:{name}" in text
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        for quantile in ("0.50", "0.95", "0.99"):
            assert f"histogram_quantile({quantile}, sum by (le) (rate(vllm:{name}_seconds_bucket" in text
