"""The service of examples/serve from outside: slow clients, and answers as its OpenAPI document describes them."""

import contextlib
import socket
import time
from http.client import HTTPConnection

import pytest
from clusterguard import export_onnx
from hypothesis import HealthCheck, given, settings

from benchmarks.studies.chaos._requests import served
from benchmarks.studies.chaos._writers import load_service, make_guard


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """An exported guard, which takes longer to make than all requests to it."""
    return str(export_onnx(make_guard(), tmp_path_factory.mktemp("serve") / "guard.onnx"))


def test_a_client_whose_headers_come_slowly_is_dropped(graph, monkeypatch):
    application = load_service().create_app(graph)
    import connections  # which the service has put into reach

    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with served(application, connections.PromptProtocol) as port:
        for first in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):  # also those of a second request
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(first)
                assert not first or client.recv(1000).startswith(b"HTTP/1.1 200")
                client.sendall(b"GET / HTTP/1.1\r\n")
                started = time.monotonic()
                with contextlib.suppress(ConnectionError):
                    for _ in iter(lambda: client.recv(1000), b""):  # ends, for the connection is closed
                        pass
                assert 0.2 < time.monotonic() - started < 20
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:  # a slow body has its own limit
            client.sendall(b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{")
            time.sleep(0.5)
            client.sendall(b"}")
            assert client.recv(1000).startswith(b"HTTP/1.1 415")


def test_who_is_connected_is_served_though_others_are_turned_away(graph):
    application = load_service().create_app(graph)
    import connections

    with served(application, connections.PromptProtocol, limit_concurrency=2) as port, contextlib.ExitStack() as opened:

        def connect():
            return opened.enter_context(contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=30)))

        def ask(client):
            client.request("GET", "/health")
            response = client.getresponse()
            return response.read() and response.status

        first, second = connect(), connect()
        assert (ask(first), ask(second)) == (200, 200)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as third:
            answer = b"".join(iter(lambda: third.recv(1000), b""))  # ends, for the connection is closed
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"\r\nRetry-After: 1\r\n" in answer
        assert ask(first) == 200
        second.close()
        status, deadline = None, time.monotonic() + 20
        while status != 200:  # until the server has seen that a place is free
            assert time.monotonic() < deadline
            with contextlib.suppress(ConnectionError):
                status = ask(connect())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_answer_is_one_that_the_schema_describes(graph, monkeypatch):
    schemathesis = pytest.importorskip("schemathesis")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served(load_service().create_app(graph)) as port:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert {operation.path for operation in operations} == {"/detect", "/model", "/health", "/metrics"}
        for operation in operations:
            check(operation)


def check(operation):
    """Send requests of an operation, and hold each answer to the statuses, media types and bodies in the schema."""
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    @settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy())
    def send(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])  # a schema cannot tell which bytes are a PNG

    send()
