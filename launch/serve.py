"""Serve a trained translator by HTTP: python launch/serve.py runs/NAME --port 8000."""

import argparse
from pathlib import Path

from infra.console import setup_logging
from infra.disk import local_path
from infra.errors import UserError, exits_cleanly
from launch.runs.chosen import add_choice
from launch.runs.serve import serve_run
from launch.serving.front import Limits
from launch.serving.server import Service

DESCRIPTION = """Serve a trained translator by HTTP, on Ray Serve.

  GET  /           a page: drop an image, see it beside its translation
  POST /translate  body: a PNG or JPEG file; answer: the translation, of the same size and format
  GET  /health     200 when it is ready, else 503
  GET  /metrics    for Prometheus

Requests that come together are translated together. The service listens for this machine alone unless --host says otherwise,
which needs a token. On SIGTERM it answers what it took and ends. docs/serving.md has more."""


def parser() -> argparse.ArgumentParser:
    limits, service = Limits(), Service()
    result = argparse.ArgumentParser(
        "serve.py",
        description=DESCRIPTION,
        epilog="example: python launch/serve.py runs/streets --port 8000 --segmenter runs/segmenter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = result.add_argument
    add_choice(result)
    option("--port", type=int, default=service.port, metavar="N", help="0 takes a free one [%(default)s]")
    option("--host", default=service.host, metavar="ADDRESS", help="where to listen [%(default)s]")
    option("--token-file", type=local_path, metavar="FILE", help="holds the token that requests must bear [none]")
    option("--direction", default="AtoB", choices=("AtoB", "BtoA"), help="from source to target, or back [%(default)s]")
    option("--segmenter", metavar="RUN_OR_FILE", help="to show which pixels look like another class afterwards [none]")
    option("--replicas", type=int, metavar="N", help="copies of the network [one for each GPU, or 1]")
    option("--gpus", type=float, metavar="X", help="of each replica; 0: none [1 where there are any]")
    option("--address", metavar="HOST:PORT", help="of a Ray cluster, or auto [Ray is started here]")
    option("--batch", type=int, default=service.batch, metavar="N", help="most images at once [%(default)s]")
    option("--wait-ms", type=float, default=service.wait_ms, metavar="X", help="for a batch to fill [%(default)s]")
    option(
        "--max-mb", type=float, default=limits.max_bytes / 1e6, metavar="X", help="10^6 bytes of a file [%(default)s]"
    )
    option(
        "--max-mp",
        type=float,
        default=limits.max_pixels / 1e6,
        metavar="X",
        help="10^6 pixels of an image [%(default)s]",
    )
    option("--timeout", type=float, default=limits.timeout_s, metavar="S", help="of a request [%(default)s]")
    option("--queue", type=int, default=limits.queue, metavar="N", help="requests at once, more get 503 [%(default)s]")
    return result


def service_of(args: argparse.Namespace) -> Service:
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port} is no port: give 0 to 65535")
    counts = {"--batch": args.batch, "--queue": args.queue, "--max-mb": args.max_mb, "--max-mp": args.max_mp,
              "--timeout": args.timeout, "--replicas": args.replicas}  # fmt: skip
    for name, value in counts.items():
        if value is not None and not 0 < value < 1e6:
            raise UserError(f"{name} {value} is impossible: give a number above 0")
    for name, value in {"--gpus": args.gpus, "--wait-ms": args.wait_ms}.items():
        if value is not None and not 0 <= value < 1e6:
            raise UserError(f"{name} {value} is impossible: give 0 or more")
    limits = Limits(int(args.max_mb * 1e6), int(args.max_mp * 1e6), args.timeout, args.queue)
    return Service(
        args.host, args.port, token_in(args.token_file), args.address, args.segmenter, args.replicas, args.gpus,
        args.batch, args.wait_ms, limits,
    )  # fmt: skip


def token_in(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file} cannot be read ({error}): give a file with the token") from None
    if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"--token-file {file} holds no token: write 8 characters or more there, without spaces, such as "
                        "what `openssl rand -hex 16` prints")  # fmt: skip
    return token


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    setup_logging(None)
    serve_run(args, service_of(args))


if __name__ == "__main__":
    main()
