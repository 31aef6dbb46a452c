"""The page, in a browser: drop an image, compare, show flips, download."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launch.serving.front import Front, Limits
from launch.serving.work import Answer, Job, Work
from tests.launch.serving.asking import listening
from tests.launch.serving.browser import CHROMIUM, Page, browser
from trainer.networks.sizes import Sizes
from trainer.translation import Translation
from trainer.translator import Translator

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")]


class Inverted(Translation):
    """Bright where it was dark; no weights."""

    @property
    def sizes(self) -> Sizes:
        return Sizes()

    def forward(self, x_NCHW: torch.Tensor, code: torch.Tensor | None = None, direction: str = "AtoB") -> torch.Tensor:
        return -x_NCHW


def by_brightness(image: np.ndarray) -> np.ndarray:
    """Road where it is dark, sky where it is bright."""
    return np.where(image.mean(axis=2) > 127, 10, 0).astype(np.uint8)


def scene(width: int = 96, height: int = 48) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 4] = (200, 220, 255)
    return image


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    segmenter: Any = by_brightness
    limits = Limits(max_pixels=2**16)
    work = Work(Translator(Inverted()), limits.max_pixels, segmenter)

    async def translate(job: Job) -> Answer:
        return (await asyncio.to_thread(work, [job]))[0]

    about = {"model": "streets", "direction": "AtoB", "styles": False, "segmenter": True}
    front = Front(limits, about, token="correct-horse", local=False)
    front.open(translate)
    front.set_replicas(1)
    with listening(front) as address:
        yield address


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(tab: Page, url: str) -> Page:
    """The page anew, whose question for the token is answered."""
    tab.call("Page.addScriptToEvaluateOnNewDocument", source="window.prompt = () => 'correct-horse'")
    tab.problems.clear()
    tab.open(url)
    tab.wait("document.getElementById('about').textContent === 'streets'")
    return tab


def translated(page: Page, file: Path) -> None:
    page.choose("#file", file)
    page.wait(
        "!document.getElementById('result').hidden && /pixels/.test(document.getElementById('message').textContent)"
    )


def pixels(page: Page, name: str) -> np.ndarray:
    """RGB of what an image of the page shows."""
    width, height, values = page.run(f"""(() => {{
        const image = document.getElementById("{name}"), canvas = document.createElement("canvas");
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [canvas.width, canvas.height, Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)];
    }})()""")
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def faults(page: Page) -> list[str]:
    """What its console complained of, beside answers that are no 200."""
    return [text for text in page.problems if not text.startswith("Failed to load resource")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    Image.fromarray(scene()).save(path)
    return path


def test_source_and_translation_are_compared(page: Page, file: Path, url: str) -> None:
    translated(page, file)
    assert np.array_equal(pixels(page, "source"), scene())
    assert np.array_equal(pixels(page, "translation"), 255 - scene())
    assert "street.png: 96 × 48 pixels" in page.run("document.getElementById('message').textContent")
    at = "getComputedStyle(document.getElementById('edge')).left"
    stage = page.run("document.getElementById('stage').clientWidth")
    page.run(
        "(() => { const s = document.getElementById('slider'); s.value = 20; s.dispatchEvent(new Event('input')); })()"
    )
    assert float(page.run(at).removesuffix("px")) == pytest.approx(0.2 * stage, abs=1)
    box = page.run("JSON.parse(JSON.stringify(document.getElementById('stage').getBoundingClientRect()))")
    x, y = box["left"] + 0.75 * box["width"], box["top"] + box["height"] / 2
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
    assert float(page.run(at).removesuffix("px")) == pytest.approx(0.75 * stage, abs=2)
    download = page.run("[document.getElementById('download').href, document.getElementById('download').download]")
    assert download[0].startswith(f"blob:{url}/") and download[1] == "street-translated.png"
    assert faults(page) == []
    assert all(asked.startswith((url, f"blob:{url}", "data:")) for asked in page.asked)


def test_flipped_classes_are_shown(page: Page, file: Path) -> None:
    translated(page, file)
    page.run("document.getElementById('show').click()")
    page.wait("document.getElementById('pairs').textContent !== ''")
    assert page.run("document.getElementById('pairs').textContent") == (
        "100.0 % of the pixels look like another class: road → sky 75.0 %, sky → road 25.0 %"
    )
    assert pixels(page, "flips").shape == (48, 96, 3)
    shown = "getComputedStyle(document.getElementById('flips')).display"
    assert page.run(shown) == "block"
    page.run("document.getElementById('show').click()")
    assert page.run(shown) == "none" and faults(page) == []


def test_an_image_may_be_dropped(page: Page) -> None:
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "JPEG")
    page.run(f"""(() => {{
        const given = new DataTransfer();
        given.items.add(new File([new Uint8Array({list(buffer.getvalue())})], "dropped.jpg", {{type: "image/jpeg"}}));
        dispatchEvent(new DragEvent("drop", {{dataTransfer: given, cancelable: true}}));
    }})()""")
    page.wait("/dropped.jpg: 96 × 48/.test(document.getElementById('message').textContent)")
    assert page.run("document.getElementById('download').download") == "dropped-translated.jpg"


def test_what_cannot_be_translated_is_said(page: Page, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"hello")
    Image.fromarray(scene(300, 300)).save(tmp_path / "large.png")
    for name, words in (
        ("no.png", "no PNG or JPEG file"),
        ("large.png", "an image of 300x300 has more than the 65536 pixels"),
    ):
        page.choose("#file", tmp_path / name)
        page.wait(f"document.getElementById('message').textContent.includes('{words}')")
        assert page.run("document.getElementById('message').className") == "error"


def test_it_fits_a_telephone(page: Page, file: Path) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=375, height=700, deviceScaleFactor=2, mobile=True)
    try:
        translated(page, file)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
