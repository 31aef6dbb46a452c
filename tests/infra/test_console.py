import io
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def stderr_and_logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.mark.parametrize(("rank", "expected"), [(0, "told\nwarning: careful\n"), (3, "warning: [rank 3] careful\n")])
def test_rank_0_informs_and_the_others_only_warn(
    rank: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    console.setup_logging(tmp_path / "log.txt", rank)
    logging.getLogger("trainer.loop").info("told")
    logging.getLogger("trainer.loop").warning("careful")
    logging.getLogger("some_library").info("noise")
    assert stderr.getvalue() == expected
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO trainer.loop: told", "WARNING trainer.loop: careful"]


def test_the_last_setup_holds_and_the_file_is_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    for _ in range(2):
        console.setup_logging(tmp_path / "log.txt")
        logging.getLogger("launch.train").info("once")
    assert stderr.getvalue() == "once\nonce\n"
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.05)
    console.setup_logging(None)
    with console.ProgressLine(total=20, initial=10, batch=4) as progress:
        for _ in range(10):
            time.sleep(0.02)
            progress.advance({"nce": 3.25})
    text = stderr.getvalue()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert 2 <= len(lines) <= 6
    assert lines[-1].startswith("100.0%  step 20/20  nce 3.250  ")
    pairs_per_s = float(lines[-1].split(" pairs/s")[0].split()[-1])
    assert 50 < pairs_per_s <= 200  # four pairs in at least 0.02 s; the first ten steps do not count


def test_a_log_line_does_not_tear_the_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(console, "TERMINAL_INTERVAL_S", 0.0)
    console.setup_logging(None)
    with console.ProgressLine(total=2) as progress:
        progress.advance({"nce": 1.0})
        logging.getLogger("trainer").info("a sample grid")
        progress.advance()
    screen = [line.rsplit("\r", 1)[-1].strip() for line in stderr.getvalue().split("\n")]
    assert screen[0] == "a sample grid"
    assert screen[1].startswith("100.0%  step 2/2  nce 1.000")


def test_other_ranks_show_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with console.ProgressLine(total=2, enabled=False) as progress:
        progress.advance({"nce": 1.0})
        progress.advance()
    assert stderr.getvalue() == ""
