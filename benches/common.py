"""What the comparisons share: processes that take turns, rates of the machine, and numbers as text.

How a comparison is kept fair:
- Each side lives in a process of its own, because two thread pools in one process disturb each other: OpenMP's threads go on spinning after their
  work, on the very cores that the other side is about to use. Only one process has work at any time; the others sleep on a pipe.
- The sides take turns, A B A B, with a pause between them: the threads of ONNX Runtime spin for 30 ms after their work, PyTorch's and CTranslate2's for
  10, and a turn that begins at once loses up to a twelfth to them. A turn is as many steps as fit into about a quarter of a second, at least one, so
  that waking up does not count. A turn's time is divided by its steps; what is reported is the median over the turns, and the spread.
- Both get the same numbers and as many threads.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

TURN_SECONDS = 0.25
PAUSE_SECONDS = 0.05
WARM_UPS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a section is told."""

    threads: int
    turns: int
    peak: dict[str, float]  # GFLOP/s and GB/s of that many threads, measured before the section
    names: list[str]  # of what to measure; empty: everything


@dataclass(frozen=True)
class Section:
    """One part of docs/benchmarks.md: how its rows are measured, and how they are written down."""

    name: str
    title: str
    measure: Callable[[Options], list[Row]]
    markdown: Callable[[list[Row], dict[str, Any]], list[str]]
    by_default: bool = True  # or only where it is named
    needs: tuple[str, ...] = ()  # what pip installs for it, beyond what `make bench` does

    def missing(self) -> list[str]:
        """What is needed and not installed."""
        modules = {need: need.partition("==")[0].replace("-", "_") for need in self.needs}
        return [need for need, module in modules.items() if importlib.util.find_spec(module) is None]


class Side(Protocol):
    """What a process does again and again."""

    def step(self) -> float:
        """Do it once; give a number that says whether both sides compute the same."""


def resident(key: str = "VmHWM") -> float:
    """MiB of this process that are (VmRSS), or at most were (VmHWM), in memory."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), float("nan"))


def faults() -> int:
    """Pages that the system has given to this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def serve(make: Callable[..., Side], arguments: tuple[Any, ...], pipe: Connection) -> None:
    """A side's process: take as many steps as the pipe asks for; say how long they took, the last number, the pages they cost."""
    import warnings

    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    side = make(*arguments)
    pipe.send("here")
    while (command := pipe.recv()) is not None:
        steps, case = command
        if case is not None:
            side.case = case  # type: ignore[attr-defined]
        before, start = faults(), time.perf_counter()
        for _ in range(steps):
            number = side.step()
        pipe.send((time.perf_counter() - start, number, (faults() - before) / steps))
    after: Callable[[], dict[str, Any]] = getattr(side, "after", dict)
    pipe.send({"peak_mib": resident()} | after())


class Player:
    """A side and its process. It plays when it is `ready`."""

    def __init__(self, make: Callable[..., Side], *arguments: Any, warm_ups: int = WARM_UPS, case: Any = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(make, arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.warm_ups, self.case = warm_ups, case

    def prepare(self, warm_ups: int, case: Any = None) -> None:
        """Warm up, for the next case if the side has several, and forget the times of the one before."""
        self.case = case
        if warm_ups > 1:
            self.play(warm_ups - 1)
        self.seconds: float = self.play(1)[0]
        self.steps: int = max(1, round(TURN_SECONDS / self.seconds))
        self.times: list[float] = []
        self.faults: list[float] = []

    def turn_to(self, case: Any) -> None:
        """Warm up for the next case, twice where that is quick."""
        self.prepare(1, case)
        if self.seconds < 4 * TURN_SECONDS:
            self.prepare(1, case)

    def play(self, steps: int) -> Any:
        self.ask(steps)
        return self.pipe.recv()

    def ask(self, steps: int) -> None:
        """The answer will come through the pipe."""
        self.pipe.send((steps, self.case))

    def turn(self) -> None:
        time.sleep(PAUSE_SECONDS)
        seconds, self.number, faults = self.play(self.steps)
        self.times.append(seconds / self.steps)
        self.faults.append(faults)

    def leave(self) -> dict[str, Any]:
        """End the process; give what it says about itself."""
        return leave({"it": self})["it"]


def ready(*players: Player) -> None:
    """Wait until all are here, for they come at the same time; let them warm up, one after the other."""
    for player in players:
        player.pipe.recv()
    for player in players:
        player.prepare(player.warm_ups, player.case)


def take_turns(players: dict[str, Player], turns: int) -> dict[str, dict[str, Any]]:
    """Let them come, play, A B A B, and leave."""
    ready(*players.values())
    for _ in range(turns):
        for player in players.values():
            player.turn()
    return leave(players)


def leave(players: dict[str, Player]) -> dict[str, dict[str, Any]]:
    """End the processes, all at the same time; give what each says about itself."""
    for player in players.values():
        player.pipe.send(None)
    about = {}
    for name, player in players.items():
        about[name] = player.pipe.recv() | {"faults_per_step": statistics.median(player.faults or [0])}
    for player in players.values():
        player.process.join()
    return about


def play_at_once(players: list[Player]) -> float:
    """All take as many steps at the same time; seconds of a step, the mean of all."""
    for player in players:
        player.ask(players[0].steps)
    return statistics.mean(float(player.pipe.recv()[0]) for player in players) / players[0].steps


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def milliseconds(player: Player) -> dict[str, float]:
    return spread([1e3 * seconds for seconds in player.times])


def ratio(ours: Player, theirs: Player) -> dict[str, float]:
    """How many times faster ours is: the medians' ratio, and the spread over the rounds."""
    rounds = [b / a for a, b in zip(ours.times, theirs.times, strict=True)]
    return spread(rounds) | {"median": statistics.median(theirs.times) / statistics.median(ours.times)}


def times_text(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def goal_text(value: float, goal: float | None, sign: str = "≥", unit: str = "") -> str:
    """Whether a goal is held; nothing is rounded in its favour."""
    if goal is None:
        return ""
    held = value >= goal if sign == "≥" else value <= goal
    return f"{sign} {goal:g}{unit}: {'held' if held else 'missed'}"


def table(head: str, rows: list[list[str]]) -> list[str]:
    """A Markdown table; `head` names the columns, divided by `|`."""
    columns = [column.strip() for column in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def machine(threads: int) -> dict[str, Any]:
    """Where this runs, and with what."""
    import numpy as np

    import transformer_rs as tr

    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().split("\n") if "model name" in line
    ]
    about = {
        "cpu": cpus[0] if cpus else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "transformer_rs": tr.__version__,
        "build": tr.build_info(),
    }
    try:
        import torch
    except ImportError:
        return about
    return about | {"torch": torch.__version__}
