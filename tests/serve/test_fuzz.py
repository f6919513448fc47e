"""A short run of ``tests.serve.fuzz``."""

import pytest

from tests.serve.fuzz import fuzz_images, fuzz_requests
from tests.serve.service import Service

pytestmark = [
    pytest.mark.timeout(900),
    # Of the libraries that make the requests.
    pytest.mark.filterwarnings("ignore"),
]


def test_mutated_images_are_captioned_or_refused(service: Service) -> None:
    outcomes = fuzz_images(service.url, 200, seed=1)
    assert not [outcome for outcome in outcomes if outcome.startswith("FAILED")], outcomes
    assert outcomes["200"] > 10
    assert outcomes["400 not_an_image"] > 50


def test_generated_requests_get_documented_answers(service: Service) -> None:
    statuses = fuzz_requests(service.url, 150, seed=1)
    assert statuses["POST /v1/captions 200"] > 10
    assert statuses["POST /v1/captions 422"] > 10
    assert not [one for one in statuses if one.endswith((" 500", " 502", " 504"))]
