"""Metrics, logs and the OpenAPI document of a server."""

from __future__ import annotations

import json
import logging
import time

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve.serving import MODEL

from deltamem_tool.serve.app import build_app
from deltamem_tool.serve.logs import LOGGER, JsonFormatter
from deltamem_tool.serve.openapi import document

pytestmark = pytest.mark.server

SECRET, NAME = "xyzzy plugh", "quentin"


def ask(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "user": NAME}
    assert httpx2.post(f"{server.api}/chat/completions", json=body, timeout=60).status_code == 200


def samples(server):
    text = httpx2.get(f"{server.url}/metrics").text
    return {
        (sample.name, sample.labels.get("path"), sample.labels.get("operation")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }, text


def test_metrics_count_requests_and_tokens(server):
    before, _ = samples(server)
    ask(server)
    after, text = samples(server)

    def more(*key):
        return after[key] - before.get(key, 0)

    assert more("deltamem_answers_total", None, None) == 1
    assert more("deltamem_answer_tokens_total", None, None) >= 1
    assert more("deltamem_requests_total", "/v1/chat/completions", None) == 1
    assert more("deltamem_store_seconds_count", None, "put") == more("deltamem_store_seconds_count", None, "get") == 1
    assert more("deltamem_first_token_seconds_count", None, None) == 1
    assert after["deltamem_queue_requests", None, None] == 0
    assert NAME not in text and "default" not in text


def test_metrics_show_an_idle_server(server):
    ask(server)
    until = time.monotonic() + 10
    while samples(server)[0]["deltamem_batch_requests", None, None]:
        assert time.monotonic() < until


def test_unknown_methods_share_one_counter(server):
    """A client can think of any number of them, and each would stay in memory."""
    for method in ("BREW", "WHEN"):
        assert httpx2.request(method, f"{server.api}/memories").status_code == 405
    text = samples(server)[1]
    assert "BREW" not in text and "WHEN" not in text
    (count,) = [line for line in text.splitlines() if line.startswith('deltamem_requests_total{method="other"')]
    assert count.endswith(" 2.0")


def requests_logged(caplog):
    return [record for record in caplog.records if record.name == LOGGER.name]


def test_logs_describe_requests_without_their_content(server, caplog):
    LOGGER.propagate = True
    with caplog.at_level(logging.INFO, LOGGER.name):
        ask(server)
        httpx2.get(f"{server.api}/memories/{NAME}")
        until = time.monotonic() + 10  # a line is written after the answer is sent
        while len(requests_logged(caplog)) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
    lines = [JsonFormatter().format(record) for record in requests_logged(caplog)]
    logged = [json.loads(line) for line in lines]
    assert [(line["method"], line["path"], line["status"]) for line in logged] == [
        ("POST", "/v1/chat/completions", 200),
        ("GET", "/v1/memories/{id}", 200),
    ]
    assert not any(word in line for line in lines for word in (*SECRET.split(), NAME))


def test_an_exception_is_logged_as_json():
    try:
        raise ValueError("broken")
    except ValueError as error:
        record = LOGGER.makeRecord("x", logging.ERROR, "", 0, "failed", (), (type(error), error, error.__traceback__))
    line = json.loads(JsonFormatter().format(record))
    assert line["level"] == "error" and "ValueError: broken" in line["exception"]


def test_the_document_has_every_route(server):
    openapi = httpx2.get(f"{server.url}/openapi.json").json()
    assert openapi == document()
    described = {(method.upper(), path) for path, methods in openapi["paths"].items() for method in methods}
    app = build_app(MODEL, server.scheduler, server.store)
    routes = {
        (method, route.path.replace(":path", ""))
        for route in app.routes
        for method in route.methods
        if method != "HEAD" and route.path not in ("/openapi.json", "/docs", "/", "/page/{name}")
    }
    assert described == routes
    text = json.dumps(openapi)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in openapi["components"]["schemas"]


def test_the_page_of_the_document_loads_nothing_from_elsewhere(server):
    page = httpx2.get(f"{server.url}/docs").text
    assert "/v1/chat/completions" in page and "http://" not in page and "https://" not in page
