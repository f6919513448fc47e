"""The table of errors: every error of the service comes from it, and its codes are a contract with programs."""

import ast
import inspect
from collections import defaultdict
from pathlib import Path

from captioner import serving
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.messages import ErrorResponse
from tests.api import Client

CONTRACT = {
    400: {"no_image", "not_an_image", "bad_form", "bad_request"},
    401: {"unauthorized"},
    404: {"not_found"},
    405: {"method_not_allowed"},
    408: {"upload_timeout"},
    413: {"request_too_large", "image_too_large"},
    415: {"type_not_allowed"},
    422: {"bad_parameter", "too_many_images", "too_costly"},
    431: {"headers_too_large"},
    500: {"error"},
    503: {"overloaded", "replica_lost", "no_metrics"},
}
# Of paths and methods that the document does not have, of what is no request, and of faults.
UNDOCUMENTED = {"not_found", "method_not_allowed", "bad_request", "headers_too_large", "error"}
SOURCES = sorted(Path(inspect.getfile(serving)).parent.glob("*.py"))


def test_codes_and_their_statuses_do_not_change() -> None:
    found = defaultdict(set)
    for code in ErrorCode:
        found[code.status].add(code.code)
    assert found == CONTRACT


def test_openapi_document_has_every_error_under_its_status() -> None:
    document = Client().ask("GET", "/openapi.json").json()
    documented = set()
    for path in document["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                content = response["content"].get("application/json", {})
                for code, example in content.get("examples", {}).items():
                    assert code in CONTRACT[int(status)]
                    assert example["value"]["error"]["code"] == code
                    assert ErrorResponse.model_validate(example["value"]).error.message
                    documented.add(code)
            assert {"401", "408", "413", "503"} <= operation["responses"].keys()
    assert documented == {code.code for code in ErrorCode} - UNDOCUMENTED


def test_every_error_is_used_and_no_other_is_made() -> None:
    used = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ErrorCode":
                used.add(node.attr)
            if isinstance(node, ast.Constant) and node.value == "error":
                # The one place where the body of an error is made.
                assert path.name == "errors.py", f"{path.name}:{node.lineno}"
    assert used == {code.name for code in ErrorCode}


def test_bare_status_of_somebody_else_is_one_of_the_table() -> None:
    for status, ours, code in (
        (404, 404, "not_found"), (405, 405, "method_not_allowed"), (408, 503, "overloaded"),
        (503, 503, "overloaded"), (500, 500, "error"), (502, 502, "error"),
    ):  # fmt: skip
        error = RequestError.of_status(status)
        assert (error.status, error.body()["error"]["code"]) == (ours, code)
