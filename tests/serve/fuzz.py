"""Feed a running service what its clients should not send: ``python -m tests.serve.fuzz --url http://127.0.0.1:8000``.

Mutated images must be captioned or refused with a reason, and requests made from the service's own OpenAPI document
must get an answer that the document describes. The exit status is 1 when one gets anything else.
"""

import argparse
import random
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import hypothesis
import schemathesis
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.fuzz_images import mutate, seed_images
from tests.pictures import picture

REFUSALS = {400, 413, 415}
CLIENTS = 8


def fuzz_images(url: str, count: int, seed: int) -> Counter[str]:
    """Outcomes of mutated images by status, or ``FAILED: ...``."""
    generator = random.Random(seed)
    seeds = seed_images()
    names = list(seeds)
    mutants = [
        mutate(seeds[generator.choice(names)], seeds[generator.choice(names)], generator)
        for _ in range(count)
    ]
    with httpx.Client(base_url=url, timeout=120) as client:

        def ask(data: bytes) -> str:
            form = {"files": {"image": ("mutant", data)}}
            sent: dict[str, Any] = form if data[:1] > b"\x80" else {"content": data}
            while True:
                answer = client.post("/v1/captions", params={"beam_size": 1}, **sent)
                if answer.status_code != 503:
                    break
                time.sleep(float(answer.headers["Retry-After"]))
            body = answer.json()
            if answer.status_code == 200 and len(body["captions"]) == 1:
                return "200"
            if answer.status_code in REFUSALS and body["error"]["message"]:
                return f"{answer.status_code} {body['error']['code']}"
            return f"FAILED: {answer.status_code} {answer.text[:200]}"

        with ThreadPoolExecutor(CLIENTS) as pool:
            return Counter(pool.map(ask, mutants))


def fuzz_requests(url: str, count: int, seed: int) -> Counter[str]:
    """Statuses of requests that fit the OpenAPI document and of some that do not.

    Raises:
        schemathesis's failures: an answer is not one that the document describes.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses: Counter[str] = Counter()
    operations = [found.ok() for found in schema.get_all_operations()]
    checks = [
        status_code_conformance,
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
    ]

    def ask(case: Any, real: bool) -> None:
        if real and case.media_type is not None:
            # Random bytes never are an image: without this nothing would reach a model.
            one = picture(sum(statuses.values()))
            case.body = {"image": [one]} if "multipart" in case.media_type else one
            # The longest searches take seconds each.
            for name in ("beam_size", "num_captions", "max_length", "mbr_samples"):
                if str(case.query.get(name, "")).isdigit():
                    case.query[name] = min(int(case.query[name]), 4)
        response = case.call(base_url=url, timeout=120)
        statuses[f"{case.method.upper()} {case.path} {response.status_code}"] += 1
        case.validate_response(response, checks=checks)

    posts = [one for one in operations if one.method.upper() == "POST"]
    others = [one for one in operations if one not in posts]
    shares = [(one, 9 * count // 10 // len(posts)) for one in posts]
    shares += [(one, count // 10 // len(others)) for one in others]
    for operation, share in shares:
        modes = [GenerationMode.POSITIVE]
        if operation in posts:
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:
            test = hypothesis.given(
                case=operation.as_strategy(generation_mode=mode),
                real=hypothesis.strategies.booleans(),
            )(ask)
            settings = hypothesis.settings(
                max_examples=-(-share // len(modes)),
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            hypothesis.seed(seed)(settings(test))()
    return statuses


def report(outcomes: Counter[str], noun: str) -> None:
    print(f"{outcomes.total():,} {noun}")
    for outcome, number in outcomes.most_common():
        print(f"{number:7,}  {outcome}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--images", type=int, default=5000, help="mutated images")
    parser.add_argument("--requests", type=int, default=2000, help="generated requests")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations and requests")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    images = fuzz_images(options.url, options.images, options.seed)
    report(images, "mutated images")
    report(fuzz_requests(options.url, options.requests, options.seed), "generated requests")
    return int(any(outcome.startswith("FAILED") for outcome in images))


if __name__ == "__main__":
    sys.exit(main())
