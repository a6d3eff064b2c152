"""Print the rows of docs/results.md from the JSON files in results/.

python scripts/results_table.py                     # what `vla-rl eval` and `vla-rl collect` left there, and condensed runs
python scripts/results_table.py --condense RUN...   # write results/NAME.json for folders of `vla-rl run`: all numbers, no list of scenes
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vla_rl.runtime.files import write_json
from vla_rl.statistics import Proportion

RESULTS = Path("results")
LONGEST = 20  # rounds of a run, but not its scenes


def condense(run: Path) -> dict[str, Any]:
    """What a run measured and how long each stage took, without anything that is as long as its scenes; paths begin at the run."""
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    here = run.resolve().parent
    return {
        "stages": {name: {"seconds": s["seconds"], **_short(s["results"] or {}, here)} for name, s in stages.items()}
    }


def _short(value: Any, here: Path) -> Any:
    if isinstance(value, dict):
        return {k: _short(v, here) for k, v in value.items() if not (isinstance(v, list) and len(v) > LONGEST)}
    if isinstance(value, list):
        return [_short(v, here) for v in value]
    return value.removeprefix(f"{here}/") if isinstance(value, str) else value


def rows(value: Any, name: str) -> Iterator[str]:
    """A row for each success that is found, with the way to it as its name."""
    if isinstance(value, list):
        value = {str(number): each for number, each in enumerate(value, 1)}
    if not isinstance(value, dict):
        return
    if isinstance(value.get("success"), dict) and "mean_length" in value:
        yield f"| {name} | {Proportion(**value['success'])} | {value['mean_length']:.1f} |"
    for key, each in value.items():
        yield from rows(each, f"{name} {key}")


def main(argv: list[str]) -> None:
    """Condense the runs that were named, or print one row per success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--condense", type=Path, nargs="+", default=[], metavar="RUN")
    chosen = parser.parse_args(argv)
    for run in chosen.condense:
        write_json(RESULTS / f"{run.name}.json", condense(run))
    if not chosen.condense:
        for path in sorted(RESULTS.glob("*.json")):
            sys.stdout.writelines(f"{row}\n" for row in rows(json.loads(path.read_text()), path.stem))


if __name__ == "__main__":
    main(sys.argv[1:])
