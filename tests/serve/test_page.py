"""The page in a real Chromium: pictures in, captions and attention out, with mouse, keyboard, touch and clipboard.

With a folder in CAPTIONER_SCREENSHOTS, light.png, dark.png and phone.png are written there.
"""

import base64
import csv
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.pictures import picture
from tests.serve.service import Service

pytestmark = pytest.mark.timeout(900)

DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
SLOW = 60_000  # milliseconds

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        message = "Chromium is missing: apt-get install chromium"
        if os.environ.get("CAPTIONER_NEEDS_CHROMIUM"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers seldom have; the only page it opens is ours.
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser: Browser, service: Service) -> Iterator[OpenPage]:
    """Open the page; at the end nothing must have come from elsewhere or failed in a script."""
    contexts, hosts, errors = [], set(), []

    def show(**options: Any) -> Page:
        context = browser.new_context(**(DESKTOP | options))
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda one: errors.append(one.text) if "Content Security" in one.text else None)  # fmt: skip
        page.goto(service.url)
        expect(page.locator("#model option")).to_have_count(2)
        page.select_option("#model", "places")
        return page

    yield show
    for context in contexts:
        context.close()
    assert errors == []
    assert hosts <= {urlsplit(service.url).netloc, ""}  # blob: addresses have no host


def file(number: int) -> dict[str, Any]:
    return {"name": f"{number}.png", "mimeType": "image/png", "buffer": picture(number, "PNG")}


def captioned(page: Page, count: int) -> None:
    expect(page.locator(".candidates:visible")).to_have_count(count, timeout=SLOW)


def brightest(page: Page) -> tuple[int, int]:
    """Row and column of the cell of the grid that the overlay is brightest in; a cell has 32 x 32 pixels."""
    cell: list[int] = page.evaluate(
        """() => {
            const canvas = document.querySelector("figure.looking canvas");
            const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            const cells = [];
            for (let row = 0; row < height / 32; row++) for (let column = 0; column < width / 32; column++)
                cells.push([data[4 * ((32 * row + 16) * width + 32 * column + 16) + 3], row, column]);
            return cells.sort((a, b) => b[0] - a[0])[0].slice(1);
        }"""
    )
    return cell[0], cell[1]


def peak(weights: list[list[float]]) -> tuple[int, int]:
    return max(
        ((row, column) for row, line in enumerate(weights) for column in range(len(line))),
        key=lambda place: weights[place[0]][place[1]],
    )


def test_several_pictures_get_captions_and_alternatives(
    open_page: OpenPage, service: Service
) -> None:
    page = open_page()
    page.set_input_files("#files", [file(number) for number in range(3)])
    captioned(page, 3)
    for number, card in enumerate(reversed(page.locator("article").all())):
        answer = service.caption(picture(number, "PNG"), model="places", num_captions=3).json()
        best = answer["captions"][0]
        assert card.locator("img").get_attribute("alt") == best["caption"]
        assert card.locator(".word").all_inner_texts() == best["caption"].split()
        rows = card.locator(".candidates li")
        expect(rows).to_have_count(3)
        every = sorted([best, *best["alternatives"]], key=lambda one: -one["log_prob"])
        found = [row.locator("span").first.inner_text() for row in rows.all()]
        assert found == [one["caption"] for one in every]
        expect(card.locator(".chosen span").first).to_have_text(best["caption"])
        for row in rows.all():
            assert row.locator(".probability").inner_text().strip()


def test_pointing_at_a_word_shows_where_the_model_looked(
    open_page: OpenPage, service: Service
) -> None:
    page = open_page()
    page.set_input_files("#files", file(0))
    captioned(page, 1)
    answer = service.caption(picture(0, "PNG"), model="places", num_captions=3, attention=True)
    attention = answer.json()["captions"][0]["attention"]
    figure = page.locator("figure")
    for number in (0, 3):
        page.locator(".word").nth(number).hover()
        expect(figure).to_have_class("looking")
        expect(page.locator("canvas")).to_have_css("opacity", "1")
        assert brightest(page) == peak(attention[number]["weights"])
    page.locator("h1").hover()
    expect(figure).not_to_have_class("looking")


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (4, 3), (1, 1), (37, 37)])
def test_grid_of_any_shape_lies_over_what_the_model_saw(
    open_page: OpenPage, rows: int, columns: int
) -> None:
    page = open_page()
    weights = [[0.0] * columns for _ in range(rows)]
    weights[-1][0] = 1.0

    def with_grid(route: Route) -> None:
        answer = route.fetch()
        body = answer.json()
        body["captions"][0]["attention"] = [{"word": "here", "weights": weights}]
        body["captions"][0]["attention_box"] = [0.125, 0.0, 0.875, 1.0]
        route.fulfill(response=answer, json=body)

    page.route("**/v1/captions*", with_grid)
    page.set_input_files("#files", file(0))
    captioned(page, 1)
    page.locator(".word").hover()
    expect(page.locator("canvas")).to_have_css("opacity", "1")
    assert brightest(page) == (rows - 1, 0)
    seen, whole = (page.locator(name).bounding_box() for name in ("canvas", "img"))
    assert seen is not None
    assert whole is not None
    assert seen["x"] == pytest.approx(whole["x"] + whole["width"] / 8, abs=1)
    assert seen["width"] == pytest.approx(0.75 * whole["width"], abs=1)
    assert (seen["y"], seen["height"]) == (whole["y"], whole["height"])


def test_everything_works_from_the_keyboard(open_page: OpenPage) -> None:
    page = open_page()
    # Before the key: asked for with it, Chromium may hear of both in the other order, and drops the chooser.
    page.on("filechooser", lambda chooser: chooser.set_files([file(1)]))  # type: ignore[list-item]
    page.locator("#captions").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#files")).to_be_focused()
    page.keyboard.press("Enter")
    captioned(page, 1)
    page.keyboard.press("Tab")
    expect(page.locator("#csv")).to_be_focused()
    page.keyboard.press("Tab")
    words = page.locator(".word")
    expect(words.nth(0)).to_be_focused()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(words.nth(2)).to_be_focused()
    expect(words.nth(2)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("figure")).to_have_class("looking")
    page.keyboard.press("Escape")
    expect(page.locator("figure")).not_to_have_class("looking")
    page.keyboard.press("Tab")
    expect(page.locator(".copy")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator(".remove")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#files")).to_be_focused()


def test_bad_file_gets_its_message_beside_the_good_one(open_page: OpenPage) -> None:
    page = open_page()
    bad = {"name": "notes.jpg", "mimeType": "image/jpeg", "buffer": b"text"}
    page.set_input_files("#files", [bad, file(0)])
    captioned(page, 1)
    error = page.locator(".error:visible")
    expect(error).to_have_text("Not an image: send JPEG, PNG, WEBP, GIF, AVIF", timeout=SLOW)
    expect(page.get_by_role("alert").filter(visible=True)).to_have_count(1)
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_picture_comes_from_clipboard_or_by_dropping(open_page: OpenPage, kind: str) -> None:
    page = open_page()
    page.evaluate(
        """([kind, text]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "image.png", { type: "image/png" }));
            const event = kind === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
                : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
        }""",
        [kind, base64.b64encode(picture(2, "PNG")).decode()],
    )
    captioned(page, 1)


def test_phone_shows_it_all_without_scrolling_sideways_and_reacts_to_a_tap(
    open_page: OpenPage,
) -> None:
    page = open_page(**PHONE)
    page.set_input_files("#files", [file(0), {**file(1), "name": 90 * "long" + ".png"}])
    captioned(page, 2)
    page.locator(".word").nth(1).tap()
    expect(page.locator("figure").first).to_have_class("looking")
    screenshot(page, "phone")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
    for button in page.locator("button").all():
        if button.is_visible():
            box = button.bounding_box()
            assert box is not None
            assert box["height"] >= 24  # WCAG 2.2, target size


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("CAPTIONER_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def luminance(page: Page, selector: str, property: str) -> float:
    value = page.locator(selector).first.evaluate(
        """(element, property) => {
            const context = new OffscreenCanvas(1, 1).getContext("2d");
            context.fillStyle = getComputedStyle(element)[property];
            context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data];
        }""",
        property,
    )
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (byte / 255 for byte in value[:3])
    )
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_can_be_read(open_page: OpenPage, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    page.set_input_files("#files", [{**file(0), "buffer": b"text"}, file(0)])
    captioned(page, 1)
    expect(page.locator(".error:visible")).to_have_count(1, timeout=SLOW)
    screenshot(page, scheme)
    back = luminance(page, "article", "backgroundColor")
    assert (back < 0.1) == (scheme == "dark")
    for selector in (".caption .word", ".facts", ".error:visible", ".hint"):
        ink = luminance(page, selector, "color")
        low, high = sorted((back, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector  # WCAG AA


def test_busy_service_is_asked_again(open_page: OpenPage) -> None:
    page = open_page()
    turned_away = 0

    def busy_once(route: Route) -> None:
        nonlocal turned_away
        turned_away += 1
        if turned_away == 1:
            busy = {"error": {"code": "overloaded", "message": "busy"}}
            route.fulfill(status=503, headers={"Retry-After": "1"}, json=busy)
        else:
            route.continue_()

    page.route("**/v1/captions*", busy_once)
    page.set_input_files("#files", file(0))
    captioned(page, 1)
    assert turned_away == 2


def test_picture_whose_replica_was_lost_is_not_sent_again_by_itself(open_page: OpenPage) -> None:
    page = open_page()
    asked = 0

    def lost(route: Route) -> None:
        nonlocal asked
        asked += 1
        error = {"error": {"code": "replica_lost", "message": "the process ended"}}
        route.fulfill(status=503, headers={"Retry-After": "1"}, json=error)

    page.route("**/v1/captions*", lost)
    page.set_input_files("#files", file(0))
    expect(page.locator("article .error")).to_have_text("The process ended", timeout=SLOW)
    page.wait_for_timeout(1500)
    assert asked == 1


def test_models_that_cannot_be_fetched_are_missed_in_sight_and_asked_for_again(
    open_page: OpenPage,
) -> None:
    page = open_page()
    failures = 0

    def fail_twice(route: Route) -> None:
        nonlocal failures
        failures += 1
        if failures == 1:
            route.abort()
        elif failures == 2:
            error = {"error": {"code": "overloaded", "message": "the service is starting"}}
            route.fulfill(status=503, json=error)
        else:
            route.continue_()

    page.route("**/v1/models", fail_twice)
    page.reload()
    trouble = page.locator("#trouble")
    expect(trouble).to_contain_text("cannot be fetched: the service does not answer")
    expect(trouble).to_be_in_viewport()
    expect(trouble).to_contain_text("the service is starting")
    expect(trouble).to_be_hidden()
    expect(page.locator("#model option")).to_have_count(2)


def test_captions_are_copied_and_downloaded(open_page: OpenPage, service: Service) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"], accept_downloads=True)
    expect(page.locator("#csv")).to_be_hidden()
    names = ['=1+1,"a".png', "b \uff1d.png", " \uff1db.png"]
    files = [{**file(number), "name": name} for number, name in enumerate(names)]
    page.set_input_files("#files", files)  # type: ignore[arg-type]
    captioned(page, 3)
    texts = [
        service.caption(picture(number, "PNG"), model="places", num_captions=3).json()["captions"][
            0
        ]
        for number in range(3)
    ]
    page.locator("article").last.get_by_role("button", name="Copy caption").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == texts[0]["caption"]
    with page.expect_download() as download:
        page.locator("#csv").click()
    rows = list(csv.reader(download.value.path().read_text("utf-8-sig").splitlines()))
    assert rows[0] == ["file", "model", "caption", "probability"]
    assert sorted(row[:3] for row in rows[1:]) == sorted(
        ["'" * (name[0] in "= ") + name, "places", text["caption"]]
        for name, text in zip(names, texts, strict=True)
    )
    for _ in names:
        page.locator(".remove").first.click()
    expect(page.locator("#csv")).to_be_hidden()
