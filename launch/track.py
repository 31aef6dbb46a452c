"""Send to MLflow what run folders hold and it has not got yet: python launch/track.py runs/NAME."""

import argparse

from infra.console import setup_logging
from infra.disk import local_path
from infra.errors import UserError, exits_cleanly
from infra.tracking import ui_command
from launch.runs.folder import RunFolder
from launch.runs.follower import send

DESCRIPTION = """Send to MLflow what run folders hold and it has not got yet: of runs that were trained while it was away,
that were killed, or that were made where there was none. Metrics, pictures, evaluations, checkpoints, model and status
arrive once, however often this is done."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "track.py",
        description=DESCRIPTION,
        epilog="example: MLFLOW_TRACKING_URI=http://server:5000 python launch/track.py runs/*",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("runs", type=local_path, nargs="+", metavar="RUN", help="run folders")
    return result


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    setup_logging(None)
    folders = [RunFolder(path) for path in args.runs]
    for folder in folders:
        if not folder.config_file.is_file():
            raise UserError(f"{folder.path} is not a run folder: give those of launch/train.py, such as runs/NAME")
    for folder in folders:
        send(folder, create=True)
        print(f"{folder.path}: all sent")
    print(ui_command())


if __name__ == "__main__":
    main()
