"""Search options of a translator with Ray Tune, or run the papers' ablations: python tuning/search.py --help."""

import sys

from infra.errors import exits_cleanly
from tuning.config import parse_arguments
from tuning.driver import search


@exits_cleanly
def main() -> None:
    print(search(parse_arguments(sys.argv[1:])))


if __name__ == "__main__":
    main()
