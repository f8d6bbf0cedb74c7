"""Write the data sets that the package ships: `python tools/embedded/make_data.py [--out FOLDER]`."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from writer.corpus import SEED
from writer.shipped import Row, shipped_sets

FOLDER = Path(__file__).parents[2] / "src" / "softprompt" / "embedded" / "data"


def write_rows(path: Path, rows: list[Row]) -> None:
    """A CSV file with a heading, or JSON lines, by the file's suffix."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in shipped_sets(SEED).items():
        write_rows(out / name, rows)
        print(f"{out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
