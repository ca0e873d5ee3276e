"""The page in a browser, as its users meet it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .conftest import Server

pytest.importorskip("fastapi", reason="the extra `serve`")
playwright = pytest.importorskip("playwright.sync_api")
WAIT = 120_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("needs chromium on the PATH")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page on a phone's screen, with a mouse as well; it must ask for nothing elsewhere and fail nowhere."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page, faults = context.new_page(), []
    page.set_default_timeout(WAIT)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
    page.on("request", lambda request: faults.append(request.url) if f":{server.port}/" not in request.url[:30] else None)
    # Chromium does not tell what a form's files were.
    page.add_init_script("""const ask = fetch;
        window.fetch = (address, options) => {
            window.sent = options.body?.get("image") ?? window.sent;
            return ask(address, options);
        };""")
    page.goto(f"http://localhost:{server.port}/")
    yield page
    context.close()
    assert [fault for fault in faults if not fault.startswith(("blob:", "data:"))] == []


@pytest.fixture
def photo(toy: Path, tmp_path: Path) -> Path:
    """Two photos side by side, with the second's orientation in the file's head rather than in its pixels."""
    first, second = (Image.open(file).resize((200, 200)) for file in sorted((toy / "queries").iterdir())[:2])
    both = Image.new("RGB", (400, 200))
    both.paste(first, (0, 0))
    both.paste(second, (200, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    both.rotate(90, expand=True).save(tmp_path / "both.jpg", exif=exif, quality=95)
    return tmp_path / "both.jpg"


def searched(page: Any, act: Any) -> bytes:
    """Do what makes the page search; returns the picture that it sent, once its answers are shown."""
    with page.expect_response("**/search?mask=true"):
        act()
    page.wait_for_selector("#results[aria-busy=false] #answers li img")
    return bytes(page.evaluate("async () => [...new Uint8Array(await sent.arrayBuffer())]"))


def size(picture: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture)).size


def test_a_photo_its_parts_and_the_whole_again(page: Any, photo: Path) -> None:
    for field in ("#file", "#camera"):
        searched(page, lambda field=field: page.set_input_files(field, photo))
    assert page.locator("#answers li").count() == 7
    assert "7 products" in page.locator("#live").inner_text()
    page.evaluate("scrollTo(0, 0)")  # back from the answers
    place = page.locator("#photo").bounding_box()
    left, top, width, height = place["x"], place["y"], place["width"], place["height"]
    assert width == pytest.approx(2 * height, rel=0.05), "as it is to be looked at"

    def draw() -> None:
        page.mouse.move(left + 0.95 * width, top + 0.9 * height)  # from the far corner
        page.mouse.down()
        page.mouse.move(left + 0.8 * width, top + 0.5 * height)
        page.mouse.move(left + 0.55 * width, top + 0.1 * height)
        page.mouse.up()

    assert size(searched(page, draw)) == (pytest.approx(160, abs=3), pytest.approx(160, abs=3))

    def widen() -> None:
        page.mouse.move(left + 0.55 * width, top + 0.1 * height)
        page.mouse.down()
        page.mouse.move(left + 0.3 * width, top + 0.1 * height, steps=3)
        page.mouse.up()

    assert size(searched(page, widen)) == (pytest.approx(260, abs=3), pytest.approx(160, abs=3))
    page.locator("#part").click()
    page.wait_for_selector("#box", state="hidden")
    page.wait_for_selector("#results[aria-busy=false] #answers li img")
    page.evaluate("scrollTo(0, 0)")
    part = searched(page, lambda: page.touchscreen.tap(left + 0.75 * width, top + 0.5 * height))
    assert size(part)[0] < 400
    assert page.locator("#box").is_visible()


def test_the_keyboard_is_enough(page: Any, photo: Path) -> None:
    searched(page, lambda: page.set_input_files("#file", photo))
    page.focus("#part")
    page.keyboard.press("Enter")
    assert page.locator(":focus").get_attribute("aria-label") == "Frame: left 20 %, top 20 %, width 60 %, height 60 %"
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowLeft", "Shift+ArrowUp", *["ArrowUp"] * 20):
        page.keyboard.press(key)
    assert page.locator("#place").inner_text() == "left 23 %, top 0 %, width 57 %, height 57 %"
    assert size(searched(page, lambda: page.keyboard.press("Enter"))) == (228, 114)
    searched(page, lambda: page.keyboard.press("Escape"))
    assert page.locator("#box").is_hidden()
    assert page.locator(":focus").get_attribute("id") == "part"


def test_paste_and_kinds_that_only_the_browser_reads(page: Any, photo: Path, tmp_path: Path) -> None:
    Image.open(photo).save(tmp_path / "both.gif")  # which the service refuses
    page.set_input_files("#file", tmp_path / "both.gif")
    page.wait_for_selector("#results[aria-busy=false] #answers li img")
    page.reload()
    paste = """bytes => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "pasted.jpg", { type: "image/jpeg" }));
        dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
    }"""
    assert searched(page, lambda: page.evaluate(paste, list(photo.read_bytes()))) == photo.read_bytes()


def test_what_is_said_where_nothing_is_found(page: Any, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "text.jpg").write_text("no picture")

    def says(text: str, file: Path) -> None:
        page.set_input_files("#file", file)
        page.locator("#live", has_text=text).wait_for()

    says("The jpeg file is broken", tmp_path / "broken.jpg")
    says("This is not a picture of a known type; allowed are jpeg", tmp_path / "text.jpg")
    page.route("**/search?**", lambda route: route.fulfill(status=429, json={"detail": "64 requests are already waiting"}))
    says("The service is busy. 64 requests are already waiting.", photo)
    page.unroute("**/search?**")
    page.route("**/search?**", lambda route: route.continue_(url=f"{route.request.url}&threshold=2"))
    says("Not in the catalogue", photo)
    assert page.locator("#answers li.best").count() == 0
    page.unroute("**/search?**")
    page.context.set_offline(True)
    says("The service cannot be reached", photo)
    page.context.set_offline(False)
    searched(page, lambda: page.get_by_role("button", name="Try again").click())
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_private_catalogue_asks_for_its_token(page: Any, photo: Path) -> None:
    def check(route: Any) -> None:
        right = route.request.headers.get("authorization") == "Bearer the-right-one"
        route.continue_() if right else route.fulfill(status=401, json={"detail": "this needs the token"})

    page.route("**/search?**", check)
    page.set_input_files("#file", photo)
    page.locator("#login").wait_for()
    page.keyboard.type("wrong")  # it has the focus
    page.keyboard.press("Enter")
    page.locator("#live", has_text="That token is not right").wait_for()
    page.fill("#token", "the-right-one")
    searched(page, lambda: page.keyboard.press("Enter"))
    assert page.locator("#login").is_hidden()


def test_the_endpoints_are_listed(page: Any, server: Server) -> None:
    page.goto(f"http://localhost:{server.port}/docs")
    assert page.locator("section h3").all_inner_texts()[:4] == [
        "POST/search",
        "POST/describe",
        "POST/catalogue",
        "DELETE/catalogue/{id}",
    ]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
