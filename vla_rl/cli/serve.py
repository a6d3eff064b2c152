"""Serve whatever acts to programs on this machine or others: a policy, a student, a graph, a selector, a residual, or LeRobot's.

A client names it by its address where a policy folder would stand, as in --policy tcp://127.0.0.1:7000. Where the server wants a token, the
client reads it from the file that the environment variable VLA_RL_TOKEN_FILE names.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sim.task import discover_tasks
from vla_rl.cli.common import CommandConfig, Simulation, base_finder, find_lone_base, open_arena, open_task
from vla_rl.inference.bases import agent_base
from vla_rl.inference.checkpoint import load_agent
from vla_rl.inference.controller import PolicyAgent
from vla_rl.inference.delayed import execution_sampler
from vla_rl.inference.lerobot_base import lerobot_folder
from vla_rl.inference.policy_server import serve_policy
from vla_rl.inference.timeline import ExecutionConfig
from vla_rl.policies.base import discover_policies
from vla_rl.runtime.errors import UserError
from vla_rl.runtime.wire import listen, read_token

EXAMPLE = "vla-rl serve runs/lift/pretrain --port 7000"
POSITIONALS = ("policy",)
prepare = discover_policies


@dataclass(frozen=True, kw_only=True)
class Config(CommandConfig):
    """Options of ``vla-rl serve``.

    policy: a folder of what acts: of this project, or a policy of LeRobot
    task: that a LeRobot policy is for (a policy of this project knows its own)
    host: address to listen on; others than this machine's own want a token
    port: to listen on (0: any that is free)
    guided: guide chunks along what still runs of the last one (method rtc), for policies that were trained without prefixes
    token_file: file with the token that a client has to know
    clients: end after so many connections have ended (0: never)
    """

    policy: Path
    task: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    guided: bool = False
    token_file: Path | None = None
    clients: int = 0


def run(config: Config) -> dict[str, Any]:
    """Serve until interrupted."""
    token = read_token(config.token_file)
    if config.guided and lerobot_folder(config.policy) is not None:
        raise UserError(f"guided is for policies of this project; {config.policy} is LeRobot's")
    if lerobot_folder(config.policy) is None:
        agent = load_agent(config.policy, find_lone_base)
        if config.guided:
            if not isinstance(agent, PolicyAgent):
                raise UserError(f"guided is for chunk policies; {config.policy} holds a residual on one")
            agent = replace(agent, sampler=execution_sampler(agent.policy, ExecutionConfig("rtc"), agent.sampler))
        base = agent_base(config.policy, agent)
    elif config.task is None:
        raise UserError(f"{config.policy} is a LeRobot policy, which does not say its task; name it with --task")
    else:
        discover_tasks()
        arena = open_arena(open_task(config.task, Simulation()), 1)
        base = base_finder(arena)(str(config.policy))
        arena.env.close()
    sock = listen(config.host, config.port, token)
    host, port = sock.getsockname()[:2]
    print(f"policy {config.policy} ({base.digest[:12]}) listens on tcp://{host}:{port}", flush=True)
    try:
        serve_policy(sock, token, base, config.clients)
    finally:
        sock.shutdown(socket.SHUT_RDWR)  # wakes who waits for clients
        sock.close()
    return {"served": config.clients}
