"""The server conforms to its OpenAPI document: requests generated from it by Schemathesis."""

from __future__ import annotations

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig
from serve.serving import MODEL

from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.memory.file import memory_bytes
from deltamem_tool.serve.memories import MEDIA_TYPE
from deltamem_tool.serve.openapi import document

pytestmark = [pytest.mark.server, pytest.mark.slow]

EXAMPLES = round(5 * float(os.environ.get("DELTAMEM_LOAD", "1")))  # of each operation, besides those of each parameter
SECONDS = 120.0  # for a request, on a busy machine
LENGTH = {"/v1/chat/completions": "max_completion_tokens", "/v1/responses": "max_output_tokens"}
NAME = "anna"  # of an existing memory
# Not checked: whether every valid request is accepted. The document cannot express which memories fit, that the last
# message must be the user's, or which version a memory has.
CONFIG = SchemathesisConfig.from_dict({"checks": {"positive_data_acceptance": {"enabled": False}}})
SCHEMA = schemathesis.openapi.from_dict(document(), config=CONFIG)


@schemathesis.serializer(MEDIA_TYPE)
def memory_file(context, value):
    return value if isinstance(value, bytes) else str(value).encode()


@pytest.fixture(scope="module")
def memory(server):
    return memory_bytes(empty_memory(server.scheduler.engine))


@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_generated_requests_conform_to_the_document(server, memory, case):
    if case.meta.generation.mode.is_positive:
        name_what_exists(server, memory, case)
    case.call_and_validate(base_url=server.url, timeout=SECONDS)


def name_what_exists(server, memory, case):
    """Replaces some of the random names by names of existing memories and models."""
    if case.path_parameters.get("id", "~") < "N":
        server.store.put("default", NAME, memory)
        case.path_parameters["id"] = NAME
    if case.path_parameters.get("model", "~") < "N":
        case.path_parameters["model"] = MODEL
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODEL
        case.body[LENGTH[case.path]] = 1  # longer answers would not test more
    if isinstance(case.body, bytes) and len(case.body) % 2:
        case.body = memory
