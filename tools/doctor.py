"""What this machine offers and what is missing, one line each, with the remedy.

python tools/doctor.py [--quick]      exit code 1 when something required is missing
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from megatron_sod.observe.doctor import examine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the sandbox's self-check")
    rows = examine(selfcheck_sandbox=not parser.parse_args().quick)
    table = Table("capability", "state", "found", "remedy")
    for row in rows:
        table.add_row(row.name, row.state, row.found, row.remedy)
    Console().print(table)
    sys.exit(any(row.is_required and row.state != "ok" for row in rows))


if __name__ == "__main__":
    main()
