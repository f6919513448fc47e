"""The HTTP API: images and parameters in, captions or a reason out."""

import json
import pickle
import tracemalloc
from typing import Any

import httpx
import pytest

from captioner.config import DecodeConfig
from captioner.serving.errors import ErrorCode, RequestError
from captioner.serving.guard import PATHS
from captioner.serving.messages import CaptionResponse
from tests.api import SEARCHES, Client
from tests.pictures import picture

PICTURE = picture(0)
PROXIES = {"/-/routes", "/-/healthz"}


def test_raw_image_is_captioned_by_the_default_model() -> None:
    client = Client()
    answer = client.post(content=PICTURE, headers={"content-type": "image/jpeg"})
    assert answer.status_code == 200
    body = answer.json()
    assert body["model"] == "first"
    assert [one["caption"] for one in body["captions"]] == [str(len(PICTURE))]
    assert {"load_ms", "wait_ms", "model_ms", "total_ms", "batch_size"} == body["timing"].keys()
    assert client.service.asked[0][2] == SEARCHES["first"]
    assert client.observed == [("/v1/captions", "POST", 200)]


def test_form_carries_several_images_and_parameters_that_go_before_the_query() -> None:
    client = Client()
    other = picture(1, "PNG")
    answer = client.post(
        "/v1/captions?beam_size=2&max_length=7",
        files=[("image", ("a.jpg", PICTURE)), ("anything", ("b.png", other))],
        data={"beam_size": "5", "num_captions": "4", "attention": "true", "model": "second"},
    )
    assert answer.status_code == 200, answer.text
    model, upload, decode = client.service.asked[0]
    assert model == "second"
    assert upload.images == [PICTURE, other]
    assert upload.names == ["a.jpg", "b.png"]
    assert upload.parameters.attention
    asked = {"beam_size": 5, "num_captions": 4, "max_length": 7}
    assert decode == SEARCHES["second"].model_copy(update=asked)


@pytest.mark.parametrize(
    ("query", "beams", "captions"),
    [("", 3, 1), ("num_captions=5", 5, 5), ("num_captions=2", 3, 2), ("beam_size=1", 1, 1)],
)
def test_beams_and_captions_fit_each_other(query: str, beams: int, captions: int) -> None:
    client = Client()
    assert client.post(f"/v1/captions?{query}", content=PICTURE).status_code == 200
    decode = client.service.asked[0][2]
    assert (decode.beam_size, decode.num_captions) == (beams, captions)


@pytest.mark.parametrize(
    ("content", "status", "code", "advice"),
    [
        (b"hello", 400, "not_an_image", "send JPEG, PNG, WEBP, GIF, AVIF"),
        (b"", 400, "no_image", "send its bytes"),
        (picture(0, "BMP"), 415, "type_not_allowed", "bmp are not accepted: send JPEG"),
        (picture(0, "TIFF"), 415, "type_not_allowed", "tiff"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "type_not_allowed", "SVG"),
        (b"\0\0\0\x1cftypheic", 415, "type_not_allowed", "type heic"),
        (b"RIFF\0\0\0\0WAVEfmt ", 400, "not_an_image", "send"),
        (PICTURE + bytes(50_000), 413, "image_too_large", "limit of 50000"),
    ],
)
def test_bad_image_gets_its_status_and_advice(
    content: bytes, status: int, code: str, advice: str
) -> None:
    client = Client(limits={"max_bytes": 50_000})
    answer = client.post(content=content)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert advice in answer.json()["error"]["message"]
    assert client.rejected == {code: 1}
    assert not client.service.asked


def test_allow_list_is_a_setting() -> None:
    client = Client(types=("bmp",))
    assert client.post(content=picture(0, "BMP")).status_code == 200
    assert client.post(content=PICTURE).status_code == 415


def test_declared_type_is_never_believed() -> None:
    client = Client()
    good = client.post(content=PICTURE, headers={"content-type": "text/plain"})
    bad = client.post(content=b"GIF8x", headers={"content-type": "image/gif"})
    assert (good.status_code, bad.status_code) == (200, 400)


def test_bad_image_among_several_is_named() -> None:
    files = [("image", ("good.jpg", PICTURE)), ("image", ("notes.jpg", b"text"))]
    answer = Client().post(files=files)
    assert answer.status_code == 400
    assert "image 2 of 2 (notes.jpg)" in answer.json()["error"]["message"]


def test_refusal_by_the_model_keeps_its_status_and_names_the_image() -> None:
    client = Client()
    refusal = RequestError(ErrorCode.IMAGE_TOO_LARGE, "60000x60000 pixels")
    # As it comes from a replica: through pickle.
    client.service.error = pickle.loads(pickle.dumps(refusal.of_image(1, ["a.jpg", "b.jpg"])))
    answer = client.post(content=PICTURE)
    assert answer.status_code == 413
    assert answer.json()["error"] == {
        "code": "image_too_large",
        "message": "image 2 of 2 (b.jpg): 60000x60000 pixels: send a smaller picture",
    }


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("beam_size=0", "beam_size: Input should be greater than or equal to 1 (got '0')"),
        ("beam_size=x", "beam_size"),
        ("num_captions=33", "num_captions"),
        ("max_length=201", "max_length"),
        ("attention=perhaps", "attention"),
        ("beam_size=2&num_captions=3", "num_captions: 3 must be at most beam_size 2"),
        ("beams=3", "beams"),
        ("model=third", "'third' is not one of first, second"),
    ],
)
def test_bad_parameter_is_422_and_named(query: str, named: str) -> None:
    client = Client()
    answer = client.post(f"/v1/captions?{query}", content=PICTURE)
    assert answer.status_code == 422
    assert named in answer.json()["error"]["message"]
    field, _, value = query.partition("=")
    if "&" not in query:
        form = client.post(files={"image": ("a.jpg", PICTURE)}, data={field: value})
        assert form.status_code == 422
        assert field in form.json()["error"]["message"]


def test_damaged_form_is_400() -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for content, headers in (
        (b"--x\r\nno headers", kind),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--", kind),
        (PICTURE, {"content-type": "multipart/form-data"}),
    ):
        answer = Client().post(content=content, headers=headers)
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("images", [4, 1500])
def test_too_many_images_are_422(images: int) -> None:
    files = [("image", (f"{n}.jpg", PICTURE)) for n in range(images)]
    answer = Client(max_images=3).post(files=files)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "too_many_images"
    assert "limit of 3 (max_images)" in answer.json()["error"]["message"]
    most = Client(max_images=images).post(files=files)
    assert len(most.json()["captions"]) == images


@pytest.mark.parametrize(
    ("images", "query", "status"),
    [
        (1, "beam_size=8&num_captions=4&max_length=30", 200),
        (2, "beam_size=8&num_captions=4&max_length=30", 422),
        (1, "beam_size=8&num_captions=4&max_length=31", 422),
        (1, "beam_size=8&num_captions=5&max_length=30", 422),
        (10, "", 200),
    ],
)
def test_search_that_costs_too_much_is_422_and_names_the_limit(
    images: int, query: str, status: int
) -> None:
    client = Client(max_cost=30 * 8 * 4)
    files = [("image", (f"{n}.jpg", PICTURE)) for n in range(images)]
    answer = client.post(f"/v1/captions?{query}", files=files)
    assert answer.status_code == status
    if status == 422:
        assert not client.service.asked
        assert answer.json()["error"]["code"] == "too_costly"
        assert "over the limit of 960 (max_cost)" in answer.json()["error"]["message"]


def test_other_paths_and_methods_answer_in_json() -> None:
    client = Client()
    assert client.ask("GET", "/nothing").json()["error"]["code"] == "not_found"
    assert client.ask("GET", "/docs").status_code == 404
    answer = client.ask("GET", "/v1/captions")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"
    # Labels of the metrics: clients cannot make more of them.
    assert {route.path for route in client.app.routes} | PROXIES == PATHS
    assert client.ask("MADE", "/openapi.json").status_code == 405
    assert client.observed == [
        ("other", "GET", 404), ("other", "GET", 404), ("/v1/captions", "GET", 405),
        ("/openapi.json", "other", 405),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b"filename*=UTF-8''na%C3%AFve%20%22dog%22.jpg", "na\u00efve _dog_.jpg"),
        (b"filename=\"dog.jpg\"; filename*=iso-8859-1'en'%E9t%E9.jpg", "\u00e9t\u00e9.jpg"),
        (b"FileName*=utf-8''a.jpg; filename=b.jpg", "a.jpg"),
        (b'filename="a;filename*=b.jpg"', "a;filename*=b.jpg"),
        (b"filename=\"\xe9.jpg\"; filename*=UTF-8''%C3%A9.jpg", "\u00e9.jpg"),
        (b"filename*=\"UTF-8''a%20b.jpg\"", "a b.jpg"),
        (b"filename*=''a.jpg", "a.jpg"),
        (b"filename*=a.jpg", "a.jpg"),
        (b"filename*=UTF-8''it's.jpg", "it's.jpg"),
        (b'filename*0="a"; filename*1="b.jpg"', "ab.jpg"),
        (b"filename*0*=UTF-8''%C3%A9; filename*1=\".jpg\"", "\u00e9.jpg"),
    ],
)
def test_files_may_be_named_as_rfc_5987_has_it(disposition: bytes, name: str) -> None:
    head = b"--x\r\nContent-Disposition: form-data; name=image; " + disposition
    content = head + b"\r\n\r\n" + PICTURE + b"\r\n--x--\r\n"
    kind = {"content-type": "multipart/form-data; boundary=x"}
    answer = Client().post(content=content, headers=kind)
    assert answer.status_code == 200, answer.text
    assert answer.json()["captions"][0]["name"] == name


@pytest.mark.parametrize(
    "name", [b"klingon''%41", b"utf-8''%ff", b"idna''%ff", b"hex''41", b"a; filename*0=b"]
)
def test_damaged_name_of_a_file_is_400(name: bytes) -> None:
    head = b"--x\r\nContent-Disposition: form-data; name=image; filename*=" + name
    kind = {"content-type": "multipart/form-data; boundary=x"}
    answer = Client().post(content=head + b"\r\n\r\nx\r\n--x--\r\n", headers=kind)
    assert answer.json()["error"]["code"] == "bad_form"


@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape", "punycode", "undefined", "cp037"])
def test_forms_are_utf_8_whatever_they_say(charset: str) -> None:
    head = "--x\r\nContent-Disposition: form-data; name="
    field = f"{head}model\r\n\r\nfirst\r\n"
    odd = f"{head}image; filename=+2AA-\\ud800\r\n\r\n"
    content = (field + odd).encode() + PICTURE + b"\r\n--x--\r\n"
    kind = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    answer = Client().post(content=content, headers=kind)
    assert answer.status_code == 200, answer.text
    assert answer.json()["captions"][0]["name"] == "+2AA-\\ud800"


def test_head_is_get_without_a_body_and_405_says_what_is_allowed() -> None:
    client = Client()
    for path in ("/", "/app.js", "/healthz", "/v1/models", "/metrics", "/openapi.json"):
        head, get = client.ask("HEAD", path), client.ask("GET", path)
        assert (head.status_code, get.status_code) == (200, 200)
        assert head.headers["content-length"] == get.headers["content-length"]
        refused = client.ask("DELETE", path)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
    assert client.ask("HEAD", "/nothing").status_code == 404
    refused = client.ask("HEAD", "/v1/captions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert ("/", "HEAD", 200) in client.observed


def test_models_health_and_metrics() -> None:
    client = Client()
    models = client.ask("GET", "/v1/models").json()["models"]
    assert [(one["name"], one["default"]) for one in models] == [("first", True), ("second", False)]
    assert client.ask("GET", "/metrics").text.startswith("ray_captioner_requests_total")
    assert client.ask("GET", "/healthz").json()["status"] == "ready"
    client.service.states["second"] = "no replica answers"
    sick = client.ask("GET", "/healthz")
    assert sick.status_code == 503
    assert sick.headers["retry-after"] == "1"
    assert sick.json()["models"]["second"] == "no replica answers"


def test_openapi_describes_answers_and_errors_with_examples() -> None:
    document = Client().ask("GET", "/openapi.json").json()
    post = document["paths"]["/v1/captions"]["post"]
    assert {"200", "400", "401", "408", "413", "415", "422", "503"} == post["responses"].keys()
    parameters = {parameter["name"]: parameter["schema"] for parameter in post["parameters"]}
    assert parameters.keys() == {"model", "attention", *DecodeConfig.model_fields}
    beams = DecodeConfig.model_json_schema()["properties"]["beam_size"]
    assert parameters["beam_size"]["anyOf"][0]["maximum"] == beams["maximum"]
    assert parameters["beam_size"]["description"] == beams["description"]
    for status, response in post["responses"].items():
        assert ("example" if status == "200" else "examples") in response["content"][
            "application/json"
        ]
    example = post["responses"]["200"]["content"]["application/json"]["example"]
    CaptionResponse.model_validate_json(json.dumps(example))
    kinds = {
        "multipart/form-data",
        *(f"image/{one}" for one in ("jpeg", "png", "webp", "gif", "avif")),
    }
    assert post["requestBody"]["content"].keys() == kinds


def test_request_is_held_twice_at_most() -> None:
    """A form's images are copied out of it, and nothing else is kept of it while the model works."""
    client = Client(guard={"max_request_bytes": 2**26})
    held: list[int] = []

    async def caption(*_: Any) -> Any:
        held.append(tracemalloc.get_traced_memory()[0])
        raise RequestError(ErrorCode.OVERLOADED)

    client.service.caption = caption  # type: ignore[method-assign]
    large = PICTURE + bytes(2**20)
    files = [("image", (f"{n}.jpg", large)) for n in range(16)]
    body = httpx.Request("POST", "http://test", files=files)
    content, kind = body.read(), {"content-type": body.headers["content-type"]}
    del files, body
    tracemalloc.start()
    assert client.post(content=content, headers=kind).status_code == 503
    tracemalloc.stop()
    # The client's own copy was there before; the API holds the request as it came, and the images.
    assert held[0] < 2.1 * len(content)
