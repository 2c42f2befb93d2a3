"""One measurement in this process: the case as JSON on standard input, the result as the last line of standard output."""

from __future__ import annotations

import json
import sys

from anarcho_cli.benching.cases import Case
from anarcho_cli.benching.measurement import measure
from anarcho_cli.errors import explain


def main() -> int:
    """Measures the case; a failure is one sentence in place of the figures."""
    case = Case.from_json(sys.stdin.read())
    try:
        result = measure(case)
    except Exception as error:  # The boundary of the process: whatever happens becomes a row of the table.
        result = {"error": explain(error)[0].partition("; run again with")[0]}
    print(f"\n{json.dumps(result, allow_nan=False)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
