"""One probe in this process: what to measure as JSON on standard input, a line of JSON on standard output for each size."""

from __future__ import annotations

import json
import sys

from anarcho_cli.fitting.probing import measure


def main() -> int:
    """Measures and tells; whatever fails but for memory ends the process with its traceback's last line."""
    for line in measure(json.load(sys.stdin)):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
