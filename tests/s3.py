"""A server that speaks S3's protocol, and fails as it is told to."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from captioner.storage import S3_ADDRESS_VARIABLES

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}


@dataclass(frozen=True)
class Fault:
    """What requests are answered with instead."""

    status: int
    code: str
    methods: str = "GET HEAD PUT POST DELETE"
    path: str = ""
    """Regular expression that is searched for in path and query."""
    body: str | None = None
    """Instead of S3's own."""
    conditional: bool = False
    """Only requests with a condition, which a status of 200 leaves out of account."""


@dataclass
class S3Server:
    """A running server; its buckets are empty at first."""

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and path of each."""
    tickets: Any = None
    """``stopping.Tickets``: how many changes may still happen."""

    @property
    def address(self) -> dict[str, str]:
        """The environment in which its clients find it."""
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    @contextmanager
    def failing(self, *faults: Fault) -> Iterator[None]:
        self.faults.extend(faults)
        try:
            yield
        finally:
            for fault in faults:
                self.faults.remove(fault)


@contextmanager
def run_server() -> Iterator[S3Server]:
    """A server on a free port of this machine."""
    moto = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        place, method = environ["REQUEST_URI"], environ["REQUEST_METHOD"]
        found.requests.append(f"{method} {place}")
        faults = found.faults
        if found.tickets is not None and not found.tickets.grant(
            method in ("PUT", "POST", "DELETE")
        ):
            faults = [Fault(403, "AccessDenied")]
        for fault in faults:
            conditions = [
                name for name in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH") if name in environ
            ]
            if fault.conditional and not conditions:
                continue
            if method in fault.methods.split() and re.search(fault.path, place):
                if fault.conditional and fault.status == 200:
                    for name in conditions:
                        del environ[name]
                    continue
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{fault.code}</Message></Error>"
                body = (text if fault.body is None else fault.body).encode()
                headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
                start_response(f"{fault.status} {fault.code}", headers)
                return [b"" if method == "HEAD" else body]
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=_Quiet)
    found = S3Server(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def clients_of(server: S3Server, bucket: str) -> Iterator[str]:
    """URI of a bucket of the server, which this process and its children find by the environment meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        for name in S3_ADDRESS_VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in {**CREDENTIALS, **server.address}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_: object) -> None:
        pass
