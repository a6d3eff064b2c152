"""Collect episodes for a residual learner that asks for them, on this machine or another.

The learner says which task, base and residual; its base has to be here under the same path, with the same hash.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.task import TaskConfig, discover_tasks
from vla_rl.actors import Desk
from vla_rl.cli.common import CommandConfig, base_finder, open_arena
from vla_rl.evaluate import Arena
from vla_rl.inference.bases import BaseSource
from vla_rl.policies.base import discover_policies
from vla_rl.runtime.config import decode
from vla_rl.runtime.wire import listen, read_token, serve_one

EXAMPLE = "vla-rl actor --host 0.0.0.0 --port 7001 --token-file token.txt"
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl actor``.

    host: address to listen on; others than this machine's own want a token
    port: to listen on (0: any that is free)
    token_file: file with the token that a learner has to know
    once: end when the first learner leaves
    """

    host: str = "127.0.0.1"
    port: int = 0
    token_file: Path | None = None
    once: bool = False


def open_setting(recipe: Mapping[str, Any], num_envs: int, reference: str) -> tuple[Arena, BaseSource]:
    """Open a task by its recipe, and find a base for it."""
    discover_tasks()
    discover_policies()
    arena = open_arena(decode(TaskConfig, recipe), num_envs)
    return arena, base_finder(arena)(reference)


def run(config: Config) -> dict[str, Any]:
    """Serve learners, one after the other."""
    token = read_token(config.token_file)
    sock = listen(config.host, config.port, token)
    host, port = sock.getsockname()[:2]
    print(f"actor listens on tcp://{host}:{port}", flush=True)
    served = 0
    try:
        while True:
            if not serve_one(sock, token, Desk(open_setting).answer):
                continue
            served += 1
            if config.once:
                return {"served": served}
            print("the learner has left; waiting for the next", file=sys.stderr)
    finally:
        sock.close()
