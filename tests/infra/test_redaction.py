"""What passwords look like, wherever a library or a person puts them."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.config import build, option
from infra.errors import UserError
from infra.redaction import holds_secret, redacted
from infra.storage import open_storage
from infra.tracking import ui_command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://alice:hunter22@host:5000/api", "http://***@host:5000/api"),
        ("at postgresql+psycopg2://u:p/w@d@host/db, once", "at postgresql+psycopg2://***@host/db, once"),
        ("https://token@host", "https://***@host"),
        ("--loop.mirror 's3://KEY:SE/CRET@bucket/run' --seed 1", "--loop.mirror 's3://***@bucket/run' --seed 1"),
        ("postgresql://host/db?user=u&password=hunter22&x=1", "postgresql://host/db?user=u&password=***&x=1"),
        ("GET https://b/k?X-Amz-Credential=a%2Fb&X-Amz-Signature=0f&n=1", "GET https://b/k?X-Amz-Credential=***&X-Amz-Signature=***&n=1"),
        ("s3://bucket/run@2", "s3://bucket/run@2"),
        ("mail a@b or see http://host:5000/#/experiments/1", "mail a@b or see http://host:5000/#/experiments/1"),
        ("/data/a@b:c", "/data/a@b:c"),
    ],
)  # fmt: skip
def test_passwords_in_urls_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert holds_secret(text) == (text != shown)


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/bPxRf+EXAMPLE")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:cor%20rect@host")
    monkeypatch.setenv("SOME_TOKEN_FILE", "/run/secrets/token")
    assert redacted("key wJalr/bPxRf+EXAMPLE, password cor%20rect or cor rect") == "key ***, password *** or ***"
    assert redacted("/run/secrets/token, http://host") == "/run/secrets/token, http://host"


def test_an_option_with_a_password_is_refused_without_showing_it() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Options:
        mirror: str | None = option(None, "")

    with pytest.raises(UserError, match="mirror holds a password or a key") as error:
        build(Options, {"mirror": "s3://KEY:hunter22@bucket/run"})
    assert "hunter22" not in str(error.value)
    with pytest.raises(UserError, match="takes no key or password") as error:
        open_storage("s3://KEY:hunter22@bucket/run")
    assert "hunter22" not in str(error.value)


def test_the_command_that_shows_runs_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:hunter22@host/db")
    assert ui_command() == 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://u:hunter22@host")
    assert ui_command() == "https://***@host"


def test_logs_and_tracebacks_hide_passwords(tmp_path: Path) -> None:
    program = (
        "import logging; from pathlib import Path; from infra.console import setup_logging\n"
        "setup_logging(Path('log'))\n"
        "try: raise ValueError('http://a:hunter22@inside')\n"
        "except ValueError: logging.getLogger('some.library').exception('http://a:hunter22@host')\n"
        "raise OSError('http://a:hunter22@outside')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "http://***@outside" in ended.stderr and "http://***@inside" in ended.stderr
    assert "http://***@host" in (tmp_path / "log").read_text()
    assert (
        "hunter22" not in ended.stderr.replace("raise OSError('http://a:hunter22", "") + (tmp_path / "log").read_text()
    )
