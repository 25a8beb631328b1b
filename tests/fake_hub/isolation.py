"""Processes, including this one, that reach only the test's own Hub."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub.server import HubServer
from huggingface_hub import constants
from huggingface_hub.hf_api import api
from huggingface_hub.utils import _detect_agent, _http

_OF_THE_CLIENT = ("HF_", "HUGGING", "TRANSFORMERS_")  # prefixes of the variables that matter
_PACKAGES = ("huggingface_hub", "transformers", "datasets")
_LOCAL = ("127.0.0.1", "localhost")


def _matters(variable: str) -> bool:
    """Whether the Hub's client reads this variable."""
    return variable.startswith(_OF_THE_CLIENT) or variable.lower().endswith("_proxy")


def environment(server: HubServer, home: Path, token: str | None = None) -> dict[str, str]:
    """The whole environment of a process whose Hub is `server` and whose downloads go below `home`."""
    variables = {name: value for name, value in os.environ.items() if not _matters(name)}
    own = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    return variables | own | ({"HF_TOKEN": token} if token else {})


def _move_home(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Replace every path below the real HF_HOME that a module has stored at import by one below `home`."""
    real = constants.HF_HOME
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] in _PACKAGES]:
        for name, value in list(vars(module).items()):
            if isinstance(value, (str, Path)) and str(value).startswith(real):
                patch.setattr(module, name, type(value)(str(value).replace(real, str(home), 1)))
    # Variables of their own may place these elsewhere.
    for name, file in (("HF_HUB_CACHE", "hub"), ("HF_TOKEN_PATH", "token"), ("HF_STORED_TOKENS_PATH", "stored_tokens")):
        patch.setattr(constants, name, str(home / file))


def _move_endpoint(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    real = constants.ENDPOINT
    patch.setattr(api, "endpoint", endpoint)  # the functions of the package are its methods
    if "transformers.utils.hub" in sys.modules:
        patch.setattr("transformers.utils.hub._hf_api", None)  # its client, which is created at first use
    for module, name in (
        ("huggingface_hub.constants", "ENDPOINT"),
        ("huggingface_hub.constants", "HUGGINGFACE_CO_URL_TEMPLATE"),
        ("huggingface_hub.utils._git_credential", "ENDPOINT"),
        ("datasets.config", "HF_ENDPOINT"),
        ("datasets.config", "HUB_DATASETS_URL"),
    ):
        if module in sys.modules:
            patch.setattr(f"{module}.{name}", getattr(sys.modules[module], name).replace(real, endpoint))


def _refuse_the_network(patch: pytest.MonkeyPatch, sought: list[str]) -> None:
    """Resolve no host but this one, and append the names of others to `sought`."""
    look_up = socket.getaddrinfo

    def local_only(host, *args, **kwargs):
        if host not in _LOCAL:
            sought.append(str(host))
            raise socket.gaierror(f"{host}: a test is not to leave this machine")
        return look_up(host, *args, **kwargs)

    patch.setattr(socket, "getaddrinfo", local_only)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[HubServer]:
    """A Hub for the client of this very process, which has neither token nor cache of the user, and waits for nothing
    before it tries again: `hub.waits` has the seconds."""
    with HubServer() as server:
        for name in [name for name in os.environ if _matters(name)]:
            monkeypatch.delenv(name)
        _move_home(monkeypatch, tmp_path / "hf-home")
        _move_endpoint(monkeypatch, server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}})
        without_waiting = SimpleNamespace(**{**vars(time), "sleep": server.waits.append})
        monkeypatch.setattr(_http, "time", without_waiting)
        monkeypatch.setattr("huggingface_hub.file_download.time", without_waiting)
        _refuse_the_network(monkeypatch, server.sought)
        _http.close_session()
        yield server
        _http.close_session()
    assert not server.sought, f"the client looked for {server.sought}"
