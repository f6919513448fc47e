"""A short run of ``tests.serve.soak``."""

import asyncio

import httpx
import pytest

from captioner.captioning.captioner import Captioner
from tests.pictures import picture
from tests.serve.conftest import ARGS
from tests.serve.service import Service
from tests.serve.soak import expected_captions, soak

pytestmark = pytest.mark.timeout(900)


@pytest.mark.chaos
def test_mixed_load_with_a_killed_replica_gets_right_captions_and_no_other_5xx(
    service: Service, models: dict[str, str]
) -> None:
    pictures = [picture(number, size=(320, 240)) for number in range(8)]
    served = httpx.get(f"{service.url}/v1/models").json()["models"][0]["version"]
    captioners = [Captioner.load(models[name], device="cpu") for name in ("v1", "v2")]
    [current] = [one for one in captioners if one.model.directory.version.startswith(served)]
    report = asyncio.run(
        soak(
            service,
            pictures,
            expected_captions(current, pictures),
            deployments=["model-words"],
            seconds=25,
            kill_every=8,
            upload_timeout_s=float(str(ARGS["upload_timeout_s"])),
            huge_bytes=500_000,
        )
    )
    assert report.problems() == [], report.table()
    assert report.kills
    wanted = {"good 200", "bad 400", "type 415", "bomb 413", "huge 413", "truncated 400"}
    assert wanted | {"burst 503", "slow 408", "slow cut off"} <= report.answers.keys(), (
        report.table()
    )
