"""Print the rows of docs/results.md from the JSON files that `vla-rl eval` and `vla-rl collect` left in results/."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vla_rl.statistics import Proportion


def main(folder: Path) -> None:
    """Print one row per file."""
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if "success" not in data:
            continue
        length = data["mean_length"]
        sys.stdout.write(f"| {path.stem} | {Proportion(**data['success'])} | {length:.1f} |\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
