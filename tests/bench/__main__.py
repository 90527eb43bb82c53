"""`python -m tests.bench`: measure, print a line a row, write docs/performance.md."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from app.demo.stack import REPOSITORY, SetupError
from tests.bench import browser, decision, frames, queries, report, scale, trail, transfer
from tests.bench.client import BenchError
from tests.bench.measure import AnyRow, Missing, Result
from tests.bench.site import Site

PAIRS, QUICK_PAIRS = 5, 2
REPORT = REPOSITORY / "docs" / "performance.md"


def main() -> int:
    arguments = _arguments()
    pairs = arguments.pairs or (QUICK_PAIRS if arguments.quick else PAIRS)
    outcomes: list[Result | Missing] = []
    broken = False
    with (
        tempfile.TemporaryDirectory(prefix="lightbox-bench-") as folder,
        Site(Path(folder), database=arguments.database, quick=arguments.quick) as site,
    ):
        chosen = [each for each in all_rows(site) if _wanted(each.name, arguments.only)]
        if not chosen:
            print("No row has such a name; --list shows them.", file=sys.stderr)
            return 1
        if arguments.list:
            for each in chosen:
                print(f"{each.name:28} {each.title}")
            return 0
        print(report.HEADING)
        for row in chosen:
            try:
                outcome = row.run(pairs)
            except (BenchError, SetupError) as error:
                broken = True
                outcome = Missing(row.name, row.title, f"it broke: {error}")
            outcomes.append(outcome)
            print(report.line(outcome), flush=True)
        clients = report.Clients(frames.floor(site))
        print(clients.text)
        if not broken and arguments.output is not None:
            arguments.output.write_text(
                report.page(
                    outcomes,
                    clients,
                    pairs=pairs,
                    database=arguments.database,
                    command=_command(arguments, pairs),
                ),
                encoding="utf-8",
            )
    return 1 if broken else 0


def all_rows(site: Site) -> Iterator[AnyRow]:
    """Every row, in the order in which it is measured and shown."""
    yield from frames.rows(site)
    yield from queries.rows(site)
    yield from browser.rows(site)
    yield from decision.rows(site)
    yield from transfer.rows(site)
    yield from scale.rows(site)
    yield from trail.rows(site)


def _wanted(name: str, only: list[str]) -> bool:
    return not only or any(name == each or name.startswith(f"{each}-") for each in only)


def _command(arguments: argparse.Namespace, pairs: int) -> str:
    """How to measure the same again."""
    words = ["python -m tests.bench", f"--pairs {pairs}", f"--database {arguments.database}"]
    words += ["--quick"] if arguments.quick else []
    return " ".join([*words, *(f"--only {each}" for each in arguments.only)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--pairs", type=int, help=f"measurements of each side ({PAIRS})")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_PAIRS} pairs and less data: to try it out"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="rows of this name, or whose names start with it and a dash; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="names of the rows, nothing measured")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"where the report goes; by default {REPORT.relative_to(REPOSITORY)} if all rows "
        "are measured in full, else nowhere",
    )
    arguments = parser.parse_args()
    if arguments.output is None and not arguments.only and not arguments.quick:
        arguments.output = REPORT
    return arguments


if __name__ == "__main__":
    sys.exit(main())
