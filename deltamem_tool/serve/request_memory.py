"""Find the memory that a request is about, from its header or from `user`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, TypeAdapter, ValidationError

from deltamem_tool.serve.body import Body
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.names import MemoryName
from deltamem_tool.serve.turns import RequestMemory

HEADER = "x-deltamem-memory"
_NAME = TypeAdapter(MemoryName)


class MemoryOptions(Body):
    """How a request uses its memory. This parameter is an extension of OpenAI's API."""

    write: bool = Field(default=True, description="Whether the messages and the answer change the memory.")
    source: MemoryName | None = Field(
        default=None,
        alias="from",
        description="Memory or response to start from, if the memory does not exist yet or is not kept.",
    )
    expires_in: float | None = Field(default=None, gt=0, description="Seconds after which the memory is deleted.")


def named_in_header(headers: Mapping[str, str]) -> str | None:
    """Return the memory's name in the header, which may be invalid; None if there is no such header.

    Most programs send it in UTF-8, browsers in Latin-1, as which every header was decoded.
    """
    name = headers.get(HEADER)
    try:
        return None if name is None else name.encode("latin-1").decode()
    except UnicodeError:
        return name


def memory_of_request(
    tenant: str, headers: Mapping[str, str], user: str | None, options: MemoryOptions | None
) -> RequestMemory:
    """Return the memory of a request: the header names it, or else `user`.

    Raises:
        RequestError: the header is not a valid memory name.
    """
    options = options or MemoryOptions()
    name = named_in_header(headers)
    if name is not None:
        try:
            user = _NAME.validate_python(name)
        except ValidationError as error:
            raise RequestError(
                f"The header {HEADER} is not a valid memory name.",
                "A name has 1 to 200 printable characters and contains no slash.",
                "Correct it.",
                code="invalid_value",
                param=HEADER,
            ) from error
    return RequestMemory(tenant, user, options.write, options.source, options.expires_in)
