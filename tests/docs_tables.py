"""Tables of docs that commands of the project print: `python -m tests.docs_tables` writes them anew.

In a page such a table stands between `<!-- table: COMMAND -->` and `<!-- end of table -->`; what COMMAND prints goes there. It
is a Python script of the repository with its arguments, and prints the same whenever its files are the same.
"""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def refreshed(text: str) -> str:
    """A page with its tables as the commands print them now."""
    return TABLE.sub(lambda found: f"{found[1]}\n{printed(found[2]).strip()}\n\n{found[3]}", text)


def printed(command: str) -> str:
    """What a command prints, run from the repository: "python SCRIPT ARGUMENTS"."""
    _, script, *arguments = shlex.split(command)
    before, output = sys.argv, io.StringIO()
    sys.argv = [script, *arguments]
    try:
        with contextlib.chdir(REPOSITORY), contextlib.redirect_stdout(output):
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = before
    return output.getvalue()


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        now = refreshed(text)
        if now != text:
            page.write_text(now)
            print(f"written: {page.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
