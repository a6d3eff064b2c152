"""Build the report of a run: one HTML file with everything in it, readable without this program or a network."""

from __future__ import annotations

import base64
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from vla_rl.improve import GATE_LOG
from vla_rl.pipeline import MANIFEST
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import read_json, read_lines, write_text
from vla_rl.runtime.metrics import FILE, read_metrics
from vla_rl.runtime.seeding import TEST_SCENES
from vla_rl.statistics import Proportion

TARGET = "report.html"
_LOSSES = ("train/loss", "validation/loss")
_SUCCESSES = ("rollout/success", "selection/success", "selection/best")


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises:
        UserError: the folder holds no run.
    """
    if not (run / MANIFEST).exists():
        raise UserError(f"no run in {str(run)!r} ({MANIFEST} is missing); make one with 'vla-rl run FILE --out {run}'")
    manifest = read_json(run / MANIFEST)
    stages = manifest["stages"]
    evaluations = [_evaluation(run, name, record) for name, record in stages.items() if _is_evaluation(record)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vla_rl.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        title=manifest["experiment"],
        task=manifest["task"],
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        data=[_data(name, record) for name, record in stages.items() if record["command"] == "collect"],
        evaluations=evaluations,
        success_plot=_success_plot(evaluations),
        gates=[_gate(name, record["results"]) for name, record in stages.items() if "kept" in record["results"]],
        curves=[(name, _curves(read_metrics(folder))) for name in stages if (folder := _trained(run / name))],
        rounds=[(name, _rounds(run / name, r)) for name, r in stages.items() if "rounds" in r["results"]],
        stages=[_budget(name, record) for name, record in stages.items()],
        total_seconds=sum(r["seconds"] for r in stages.values()),
        versions=next(reversed(stages.values()))["versions"] if stages else {},
        experiment=(run / "experiment.yaml").read_text(),
        configs=[
            (name, (run / name / "config.yaml").read_text()) for name in stages if (run / name / "config.yaml").exists()
        ],
    )
    write_text(run / TARGET, html)
    return run / TARGET


def _is_evaluation(record: dict[str, Any]) -> bool:
    return record["command"] == "eval" and ("success" in record["results"] or "paired" in record["results"])


def _trained(stage: Path) -> Path | None:
    """The folder with a stage's metrics: its own, or that of the training in it."""
    return next((folder for folder in (stage, stage / "training") if (folder / FILE).exists()), None)


def _gate(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """What a stage compared on the selection scenes before it kept what it made."""
    arms = {k: str(Proportion(**v)) for k, v in results.items() if isinstance(v, dict) and "successes" in v}
    return {"name": name, "arms": arms, "paired": results.get("paired"), "kept": results["kept"]}


def _data(name: str, record: dict[str, Any]) -> dict[str, Any]:
    results = record["results"]
    success = results["success"]
    return {
        "name": name,
        "episodes": results["episodes"],
        "frames": results["frames"],
        "mean_length": results["mean_length"],
        "success": str(Proportion(**success)) if success else "not recorded",
    }


def _evaluation(run: Path, name: str, record: dict[str, Any]) -> dict[str, Any]:
    whole = read_json(run / name / "eval.json")
    arms = [whole] if "scenes" in whole else [whole["a"], whole["b"]]
    videos = [
        _video(path)
        for path in sorted((run / name / "videos").glob("*.mp4"), key=lambda p: (p.stem.startswith("failure"), p.stem))
    ]
    seeds = [scene["scene_seed"] for scene in arms[0]["scenes"]]
    if min(seeds) >= TEST_SCENES:
        where = f"on test scenes {min(seeds)} to {max(seeds)}, which no stage trains or selects on"
    else:
        where = f"on scenes {min(seeds)} to {max(seeds)}, which are no test scenes"
    return {
        "where": where,
        "name": name,
        "arms": [_arm(arm) for arm in arms],
        "paired": whole.get("paired"),
        "videos": videos,
    }


def _arm(arm: dict[str, Any]) -> dict[str, Any]:
    return {
        "policy": Path(arm["policy"]).name,
        "success": Proportion(**arm["success"]),
        "text": str(Proportion(**arm["success"])),
        "mean_length": arm["mean_length"],
        "mean_length_of_successes": arm["mean_length_of_successes"],
        "mean_return": arm["mean_return"],
        "mean_max_coverage": arm["mean_max_coverage"],
        "calls_per_s": arm["timing"]["policy_calls_per_s"],
        "steps_per_s": arm["timing"]["env_steps_per_s"],
        "scenes": arm["scenes"],
    }


def _video(path: Path) -> dict[str, str]:
    word, _, scene = path.stem.partition("_")
    return {"word": word, "scene": scene, "data": base64.b64encode(path.read_bytes()).decode()}


def _budget(name: str, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "command": record["command"],
        "seconds": record["seconds"],
        "resumed": record.get("resumed", False),
        "budget": record["budget"],
        "output": record["output"][:12],
    }


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _success_plot(evaluations: list[dict[str, Any]]) -> str:
    rows = [
        (f"{e['name']}: {arm['policy']}" if len(e["arms"]) > 1 else e["name"], arm["success"])
        for e in evaluations
        for arm in e["arms"]
    ]
    if not rows:
        return ""
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.45 * len(rows)))
    for y, (_, success) in enumerate(rows):
        error = [[100 * (success.rate - success.low)], [100 * (success.high - success.rate)]]
        axes.barh(y, 100 * success.rate, height=0.55, color="#4c78a8")
        axes.errorbar(100 * success.rate, y, xerr=error, color="#1b1b1b", capsize=4, linewidth=1.2)
        axes.text(102, y, f"{100 * success.rate:.1f} %  (n = {success.n})", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("success, % (bars: exact 95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _rounds(folder: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """What each round of the offline stage did, and every decision of its gate."""
    rounds = []
    for done in record["results"]["rounds"]:
        log = folder / f"round-{done['round']}" / GATE_LOG
        shown = {
            name: str(Proportion(**{k: v for k, v in s.items() if k != "mean_length"}))
            for name, s in done.get("selection", {}).items()
        }
        rounds.append({**done, "selection": shown, "gate": [json.loads(line) for line in read_lines(log)]})
    return rounds


def _curves(metrics: list[dict[str, Any]]) -> str:
    """Errors over gradient steps, or success over control steps where the stage learns by trying."""
    trying = any(name in m for m in metrics for name in _SUCCESSES)
    figure, axes = plt.subplots(figsize=(7, 2.6))
    for name in _SUCCESSES if trying else _LOSSES:
        points = [(m.get("rollout/env_steps", m["step"]), m[name]) for m in metrics if name in m]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set_xlabel("control step" if trying else "gradient step")
    axes.set_ylabel("success" if trying else "training error")
    if not trying:
        axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)
