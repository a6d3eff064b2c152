"""The arrows of design.md, and habits that a reader may rely on."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

from vla_rl.cli import main
from vla_rl.cli.main import field_docs

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vla_rl", "sim", "real_robot")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))

# a module may import what stands in its own row or below; cli wires and may import all
LAYERS = [
    ["vla_rl.cli"],
    ["vla_rl.pipeline", "vla_rl.report", "vla_rl.bench_gate", "vla_rl.bench_residual"],
    [
        "vla_rl.offline",
        "vla_rl.online",
        "vla_rl.residual",
        "vla_rl.residual_ppo",
        "vla_rl.distill_back",
        "vla_rl.distill",
        "vla_rl.taco",
    ],
    ["vla_rl.actors", "vla_rl.ray_hands"],
    [
        "vla_rl.pretrain",
        "vla_rl.lesson",
        "vla_rl.evaluate",
        "vla_rl.record",
        "vla_rl.improve",
        "vla_rl.preconditions",
        "vla_rl.residual_settings",
        "vla_rl.residual_checks",
        "vla_rl.residual_runs",
    ],
    ["vla_rl.algos", "vla_rl.inference"],
    ["vla_rl.policies"],
    ["vla_rl.kernels", "vla_rl.nets", "vla_rl.encoders"],
    ["vla_rl.data"],
    ["vla_rl.types", "vla_rl.statistics"],
    ["vla_rl.runtime"],
]
# sim and real_robot may use these parts of vla_rl only
UNSAFE_MODULES = ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FOR_OUTSIDE = ("vla_rl.types", "vla_rl.data", "vla_rl.inference", "vla_rl.runtime")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int | None:
    for level, names in enumerate(LAYERS):
        if any(module == n or module.startswith(n + ".") for n in names):
            return level
    return None


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_import_follows_the_arrows(path: Path) -> None:
    module = module_name(path)
    for name in imports(path):
        package = name.split(".")[0]
        if package not in PACKAGES:
            continue
        if module.startswith("vla_rl.") and not module.startswith("vla_rl.cli"):
            assert package == "vla_rl", f"{module} imports {name}: learning knows neither simulation nor robots"
            mine, theirs = layer(module), layer(name)
            assert mine is not None, f"{module} stands in no layer"
            assert theirs is None or theirs >= mine, f"{module} imports {name}, which stands above it"
        elif module.startswith(("sim", "real_robot")) and package == "vla_rl":
            assert name == "vla_rl" or name.startswith(FOR_OUTSIDE), f"{module} imports {name}"
        elif package != "vla_rl":
            assert module.startswith("vla_rl.cli") or module.split(".")[0] == package, f"{module} imports {name}"


def test_the_import_test_sees_a_reversed_arrow() -> None:
    assert layer("vla_rl.nets.mlp") > layer("vla_rl.algos.bc")  # type: ignore[operator]
    assert layer("vla_rl.policies.flow") > layer("vla_rl.cli.eval")  # type: ignore[operator]


def unsafe_loading(text: str) -> list[str]:
    """What in a source can run code that a data file brings along."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Call):
            given = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
            called = ast.unparse(node.func)
            safe_torch = given.get("weights_only") is True
            if (called == "torch.load" or "weights_only" in given) and not safe_torch:
                found.append(f"{called} without weights_only")
            if given.get("allow_pickle", False) is not False:
                found.append(f"{called} with pickle")
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
                found.append(called)
    return found


@pytest.mark.parametrize(
    "line",
    [
        *(f"import {module}" for module in UNSAFE_MODULES),
        "from joblib import load",
        "torch.load(path)",
        *(f"torch.load(path, weights_only={value})" for value in ("False", "flag")),
        *(f"numpy.load(path, allow_pickle={value})" for value in ("True", "flag")),
        "yaml.load(text)",
    ],
)
def test_unsafe_loading_is_seen(line: str) -> None:
    assert unsafe_loading(f"def f():\n    {line}")
    assert not unsafe_loading("torch.load(path, weights_only=True)\nyaml.safe_load(text)\nnumpy.load(path)")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_file_is_free_of_pickle_and_short(path: Path) -> None:
    text = path.read_text()
    assert not unsafe_loading(text)
    limit = 300 if "algos" in path.parts else 400
    assert len(text.splitlines()) <= limit


@pytest.mark.parametrize("path", [p for p in FILES if "vla_rl" in p.parts], ids=module_name)
def test_every_net_is_free_of_dropout_and_batch_norm(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith(("BatchNorm", "SyncBatchNorm")), (
                "statistics of a batch in the likelihood path"
            )
            assert not node.attr.startswith("Dropout")
        if isinstance(node, ast.keyword) and node.arg == "dropout":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value == 0.0


def config_classes() -> list[type]:
    found = []
    for package in PACKAGES:
        for info in pkgutil.walk_packages([str(ROOT / package)], package + "."):
            module = importlib.import_module(info.name)
            for value in vars(module).values():
                named = inspect.isclass(value) and value.__module__ == info.name and dataclasses.is_dataclass(value)
                if named and value.__name__.endswith(("Config", "Settings", "Task")):
                    found.append(value)
    return found


@pytest.mark.parametrize("cls", config_classes(), ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_every_config_is_frozen_documented_and_read(cls: type) -> None:
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    docs = field_docs(cls)
    source = "\n".join(p.read_text() for p in FILES)
    for field in dataclasses.fields(cls):
        assert field.name in docs, f"{cls.__name__}.{field.name} has no line in its docstring"
        assert re.search(rf"\.{field.name}\b", source), f"nothing reads {cls.__name__}.{field.name}"


def test_commands_are_found_without_a_list() -> None:
    names = main.command_names()
    assert {"collect", "data info", "data import", "pretrain", "eval", "run", "report", "doctor", "bench data"} <= set(
        names
    )


def test_results_name_no_machine() -> None:
    """What a run measured is read elsewhere: a path of the machine that it ran on means nothing there."""
    results = sorted((ROOT / "results").glob("*.json"))
    assert results
    for path in results:
        assert not re.search(r'"/[^"]*/', path.read_text()), path
