"""Find the memory that a request is about, from its header or from `user`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, TypeAdapter, ValidationError

from deltamem_tool.serve.body import Body
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.names import MemoryName
from deltamem_tool.serve.turns import Whose

HEADER = "x-deltamem-memory"
_NAME = TypeAdapter(MemoryName)


class MemoryOptions(Body):
    """What becomes of the memory; a parameter of this server alone."""

    write: bool = Field(default=True, description="Whether the messages and the answer change the memory.")
    source: MemoryName | None = Field(
        default=None,
        alias="from",
        description="Memory or response to start from, if the memory does not exist yet or is not kept.",
    )
    expires_in: float | None = Field(default=None, gt=0, description="Seconds after which the memory is deleted.")


def whose(tenant: str, headers: Mapping[str, str], user: str | None, options: MemoryOptions | None) -> Whose:
    """Return the memory that the header names, or else `user`, inside the tenant.

    Raises:
        RequestError: the header is not a name.
    """
    options = options or MemoryOptions()
    named = headers.get(HEADER)
    if named is not None:
        try:
            user = _NAME.validate_python(named)
        except ValidationError as error:
            raise RequestError(
                f"The header {HEADER} is not a valid memory name.",
                "A name has 1 to 200 printable characters and contains no slash.",
                "Correct it.",
                code="invalid_value",
                param=HEADER,
            ) from error
    return Whose(tenant, user, options.write, options.source, options.expires_in)
