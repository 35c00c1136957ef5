"""Keys, origins, logs, and what listens where."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.support.server import Server, wait_for

KEYS = ("first-key-0123", "second-key-4567")
SECRET = "the secret of the prompt"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on all interfaces, with keys, CORS and logs."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# who may call\n{KEYS[1]}\n\n")
    arguments = ["--host", "0.0.0.0", "--api-key", KEYS[0], "--api-key-file", str(file), "-tp", "2"]
    arguments += ["--allowed-origins", "https://app.example"]
    with Server(*arguments, env={"YALIS_LOG_LEVEL": "INFO"}) as server:
        yield server.ready()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys(locked: Server) -> None:
    body = {"prompt": SECRET, "max_tokens": 1}
    for headers in ({}, bearer("wrong-key-0000"), bearer(KEYS[0][:-1]), {"authorization": KEYS[0]}, bearer("\xff")):
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/start_profile"):
            answer = locked.post(path, body, headers=headers)
            assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in KEYS:
        assert locked.post("/v1/completions", body, headers=bearer(key)).status == 200
    for path in ("/v1/models", "/state", "/tokenizer_info", "/v1/nothing"):
        assert locked.get(path).status == 401
    for path in ("/health", "/ready", "/metrics", "/version", "/openapi.json", "/"):
        assert locked.get(path).status == 200
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS[1], max_retries=0)
    assert client.models.list().data
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nonsense-key").models.list()


def test_the_description_tells_about_the_key(locked: Server, one: Server) -> None:
    assert locked.get("/openapi.json").json()["security"] == [{"key": []}]
    assert "security" not in one.get("/openapi.json").json()


def test_cors_for_the_named_origin_only(locked: Server, one: Server) -> None:
    def preflight(server: Server, origin: str) -> http.client.HTTPMessage:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        headers = {"origin": origin, "access-control-request-method": "POST"}
        connection.request("OPTIONS", "/v1/completions", headers=headers)
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.headers

    assert preflight(locked, "https://app.example")["access-control-allow-origin"] == "https://app.example"
    assert preflight(locked, "https://evil.example")["access-control-allow-origin"] is None
    assert preflight(one, "https://app.example")["access-control-allow-origin"] is None


def test_pages_of_other_sites_start_no_profile(locked: Server, one: Server) -> None:
    for path in ("/start_profile", "/stop_profile"):  # no content type, so browsers would not ask first
        for origin in ("https://evil.example", "null", "http://["):
            answer = one.request("POST", path, headers={"origin": origin})
            assert answer.status == 403 and answer.error["code"] == "origin_not_allowed"
        for origin in (locked.url, "https://app.example"):  # its own, and the one that was named
            headers = {**bearer(KEYS[0]), "origin": origin}
            assert locked.request("POST", path, headers=headers).error["code"] == "profiling_disabled"


def test_prompts_are_not_logged_and_requests_are(locked: Server) -> None:
    locked.post(
        "/v1/completions", {"prompt": SECRET, "max_tokens": 1}, headers={**bearer(KEYS[0]), "x-request-id": "id-5"}
    )
    wait_for(lambda: "request id-5" in locked.stderr, 5.0, "the log's line")
    assert "POST /v1/completions -> 200" in locked.stderr
    assert SECRET not in locked.stderr
    assert not any(key in locked.stderr for key in KEYS)


def test_prompts_are_logged_when_asked_for() -> None:
    with Server("--log-requests", "--host", "0.0.0.0") as server:
        server.ready().complete(SECRET, max_tokens=1)
        assert SECRET in server.stderr
        assert "listening on 0.0.0.0 without an API key" in server.stderr  # the warning


def test_only_the_http_socket_leaves_loopback(two: Server, locked: Server) -> None:
    for server in (two, locked):
        outside = []
        main = psutil.Process(server.process.pid)
        for process in [main, *main.children(recursive=True)]:
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.startswith(("127.", "::1")):
                    outside.append((process.pid, connection.laddr))
        allowed = [(main.pid, server.port)] if server is locked else []
        assert [(pid, address.port) for pid, address in outside] == allowed, outside
