"""The table of docs/matching.md: python -m tests.adversarial [--each N] [--seed N]"""

import argparse
import time

from tests.adversarial.case import INVISIBLE, KINDS
from tests.adversarial.tally import HEAD, Row, common_day, line, tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=300, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    start = time.perf_counter()
    rows = tally(KINDS, wanted.each, wanted.seed)
    spent = time.perf_counter() - start
    total = Row()
    print(HEAD)
    for words, row in rows.items():
        print(line(words, row))
        total += row
    print(line("**all**", total))
    print(line("**a common day**", common_day(5000, wanted.seed)))
    print(f"\n{1000 * spent / total.cases:.2f} ms a case, made and matched\n")
    print("What no header shows:\n")
    print(HEAD)
    for words, row in tally(INVISIBLE, wanted.each, wanted.seed).items():
        print(line(words, row))


if __name__ == "__main__":
    main()
