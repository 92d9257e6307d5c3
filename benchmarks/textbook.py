"""The textbook Transformer at several sizes: `python -m benchmarks.textbook` writes results/textbook.json."""

import argparse

from benchmarks.machine import write
from examples import textbook

SIZES = (0.4, 0.3, 0.25)  # below .22 the least rank of 8 everywhere is too much


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.textbook", description=__doc__).parse_args()
    rows = {str(keep): textbook.main(keep) for keep in SIZES}
    for keep, row in rows.items():
        print(keep, row)
    write("textbook", {"results": rows}, seed=0)


if __name__ == "__main__":
    main()
