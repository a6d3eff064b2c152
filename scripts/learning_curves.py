"""Print success on selection scenes over environment steps, for stages of `vla-rl run` that learn by trying, and draw them.

python scripts/learning_curves.py --out results/lift_curves residual=runs/res/lift_0/residual RLPD=runs/res/rlpd_0/rlpd

A name that stands several times is one method with several seeds: each is printed and drawn. Writes OUT.svg and OUT.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from vla_rl.runtime.files import read_json, write_json
from vla_rl.runtime.metrics import FILE, read_metrics

Curve = list[tuple[int, float]]


def curve(stage: Path) -> Curve:
    """(environment steps, success) of a stage's evaluations: of the residual's log, or of the offline stage's rounds."""
    if (stage / FILE).exists():
        points = [(m["step"], m["selection/success"]) for m in read_metrics(stage) if "selection/success" in m]
        if not points:
            raise SystemExit(f"the log of {stage} holds no selection/success; a residual's does")
        return points
    steps, rounds = 0, []
    for done in read_json(stage.parent / "manifest.json")["stages"][stage.name]["results"]["rounds"]:
        steps += done["env_steps"]
        rounds.append((steps, done["selection"]["policy"]["rate"]))
    return rounds


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("stages", nargs="+", metavar="NAME=STAGE")
    chosen = parser.parse_args()
    found: dict[str, list[Curve]] = {}
    for named in chosen.stages:
        name, equals, stage = named.partition("=")
        if not equals or not stage:
            parser.error(f"a stage looks like NAME=FOLDER, got {named!r}")
        found.setdefault(name, []).append(curve(Path(stage)))
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for number, (name, curves) in enumerate(found.items()):
        for one in curves:
            axes.plot(*zip(*one, strict=True), marker=".", color=f"C{number}", label=name if one is curves[0] else None)
            print(f"| {name} | " + ", ".join(f"{100 * success:.1f} % at {steps:,}" for steps, success in one) + " |")
    axes.set(xlabel="environment step, warm-up included", ylabel="success on selection scenes", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(chosen.out.with_suffix(".svg"), bbox_inches="tight")
    write_json(chosen.out.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
