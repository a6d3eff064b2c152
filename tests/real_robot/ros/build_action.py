"""Make the package ``peer_interfaces`` with the action ``Move`` in a folder: none of the wheels brings an action type.

    python build_action.py FOLDER

Runs in an environment of ``scripts/ros_peers.sh``, whose wheels have ROS 2's own generators and headers; wants g++. The steps are those of
``rosidl_generate_interfaces`` in CMake; FOLDER then belongs on PYTHONPATH and on LD_LIBRARY_PATH.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

os.environ["AMENT_PREFIX_PATH"] = sys.prefix  # where the generators find their templates

import numpy as np
from rosidl_generator_c.cli import GenerateC
from rosidl_generator_py.cli import GeneratePython
from rosidl_typesupport_c.cli import GenerateCTypesupport
from rosidl_typesupport_fastrtps_c.cli import GenerateFastRTPSCTypesupport
from rosidl_typesupport_introspection_c.cli import GenerateIntrospectionCTypesupport

PACKAGE = "peer_interfaces"
IDL = Path(__file__).parent / "action" / "Move.idl"
SUPPORTS = ["rosidl_typesupport_fastrtps_c", "rosidl_typesupport_introspection_c"]
# libraries of the wheels: of each interface package, and of the generators' own
LINKED = [
    f"lib*__{name}.so" for name in ("rosidl_generator_c", "rosidl_generator_py", "rosidl_typesupport_c", *SUPPORTS)
]
LINKED += ["librosidl_*.so", "libfastcdr.so", "librcutils.so", "librmw.so"]


def main(folder: Path) -> None:
    """Generate, compile and link, one library for each generator as in CMake."""
    generators = {
        "rosidl_generator_c": GenerateC("c"),
        SUPPORTS[0]: GenerateFastRTPSCTypesupport("fastrtps_c"),
        SUPPORTS[1]: GenerateIntrospectionCTypesupport("introspection_c"),
        "rosidl_typesupport_c": GenerateCTypesupport("c", typesupport_implementations=SUPPORTS),
        "": GeneratePython("py", typesupport_implementations=["rosidl_typesupport_c"]),
    }
    headers = Path(sys.prefix) / "include"
    include = [sysconfig.get_path("include"), np.get_include(), headers, *headers.iterdir()]
    include += [folder / "generated" / name for name in generators if name]
    flags = ["-O1", "-fPIC", "-w", *(f"-I{path}" for path in include)]
    theirs = [path for pattern in LINKED for path in sorted((Path(sys.prefix) / "lib").glob(pattern))]
    ours: list[Path] = []
    for name, generator in generators.items():
        root = (folder / "generated" / name if name else folder) / PACKAGE
        generator.generate(PACKAGE, [f"{IDL.parents[1]}:action/{IDL.name}"], [f"{sys.prefix}/share"], root)
        objects = []
        for source in sorted(path for path in root.rglob("*.c*") if path.suffix in (".c", ".cpp")):
            objects.append(f"{source}.o")
            compiler = "g++" if source.suffix == ".cpp" else "gcc"
            subprocess.run([compiler, *flags, "-c", source, "-o", objects[-1]], check=True)
        library = folder / (f"lib{PACKAGE}__{name}.so" if name else f"{PACKAGE}/{PACKAGE}_s__rosidl_typesupport_c.so")
        subprocess.run(["g++", "-shared", "-o", library, *objects, *ours, *theirs], check=True)
        ours.append(library)
    (folder / PACKAGE / "__init__.py").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
