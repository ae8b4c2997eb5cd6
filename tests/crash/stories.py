"""Runs that are killed and started again until they have ended, and what came of them: nothing may differ from a run that
nothing happened to, and nothing may be left."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megadpo.model.weights.dist_folder import COMMON_FILE
from megadpo.model.weights.safe_files import read_data
from tests.crash import rank as in_rank
from tests.crash.rank import Aim, Visit
from tests.helpers.distributed import REPOSITORY, rank_environment, start_rank
from tests.helpers.overrides import DIST, PP2, TP2
from tests.helpers.runs import make_config, make_model, read_metrics

LAYOUTS = {"tp2": [TP2], "dp2, distributed optimizer": [DIST], "pp2": [PP2]}
ASYNC = "checkpointing.async_save=true"
STEPS, MOST_KILLS_A_RUN, LONGEST_S = 8, 6, 150
NAMES = ("train/loss", "train/grad_norm", "train/rewards/margins", "train/lr")
IMPORTS = "imports"
PHASES = [
    *(IMPORTS, in_rank.STARTING, in_rank.DATA, in_rank.CACHED_REFERENCE, in_rank.LOADING, in_rank.FIRST_STEP),
    *(in_rank.STEPS, in_rank.SAVES, in_rank.WRITES, in_rank.ASYNC_WRITES, in_rank.PRUNING, in_rank.EXPORT),
]
IN_TWO_SAVES = {in_rank.SAVES: 4, in_rank.WRITES: 2, in_rank.ASYNC_WRITES: 2, in_rank.LOADING: 2}
"""How often a run gets to a phase, where that is more than once, while it does what every start has left to do."""
ONLY_RANK_0 = {in_rank.PRUNING, in_rank.EXPORT}
IMPORT_S, START_S = 4.0, 0.3
"""How long importing takes, and starting from a process that has imported: the latest times to die there."""


@dataclass
class Count:
    """What a number of killed runs came to."""

    kills: Counter[str] = field(default_factory=Counter)
    """By the phase that the rank died in."""
    runs: int = 0
    restarts: int = 0
    differing: list[str] = field(default_factory=list)
    """Metrics of a step, and files, that differ from those of the run that nothing happened to."""
    leftovers: list[str] = field(default_factory=list)
    orphans: int = 0
    failures: list[str] = field(default_factory=list)
    """Runs that hung, or that didn't go on after a kill."""

    def __add__(self, other: Count) -> Count:
        both = {one.name: getattr(self, one.name) + getattr(other, one.name) for one in dataclasses.fields(Count)}
        return Count(**both)

    def table(self) -> list[str]:
        lines = ["| killed in | kills |", "|---|---|"]
        lines += [f"| {phase} | {self.kills[phase]} |" for phase in [*PHASES, in_rank.BETWEEN] if self.kills[phase]]
        lines += [f"| all | {sum(self.kills.values())} |", ""]
        lines.append(f"{self.runs} runs ended after {self.restarts} restarts")
        lines.append(
            f"differing metrics and files: {len(self.differing)}; left in checkpoint folders: {len(self.leftovers)}"
        )
        lines.append(f"processes that outlived their rank: {self.orphans}; failures: {len(self.failures)}")
        return lines + [f"  {one}" for one in [*self.differing, *self.leftovers, *self.failures]]

    @property
    def is_good(self) -> bool:
        return not (self.differing or self.leftovers or self.orphans or self.failures)


@dataclass(frozen=True)
class Untouched:
    """The run that nothing happened to."""

    metrics: dict[str, str]
    files: dict[str, bytes]
    visits: dict[tuple[int, str], list[Visit]]
    """By rank and phase."""


class World:
    """A model, and for each layout the run that nothing happened to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model")
        self._untouched: dict[str, Untouched] = {}
        self._number = 0

    def new_run(self) -> Path:
        self._number += 1
        folder = self.folder / f"run{self._number}"
        folder.mkdir()
        make_config(
            folder,
            self.model,
            dpo={"max_num_steps": STEPS, "max_num_epochs": 2, "reference": {"mode": "cached"}},
            data={"cache_dir": str(folder / "cache")},
            checkpointing={"enabled": True, "save_period": 2, "keep_top_k": 1},
        )
        return folder

    def untouched(self, layout: str) -> Untouched:
        if layout not in self._untouched:
            folder = self.new_run()
            trained = train(folder, LAYOUTS[layout], None)
            exported = export(folder, None)
            assert (trained.codes, exported.codes) == ([0, 0], [0]), (trained, exported)
            visits: dict[tuple[int, str], list[Visit]] = {}
            for number, (_, found) in [*enumerate(trained.results), *enumerate(exported.results)]:
                for visit in found:
                    visits.setdefault((number, visit.phase), []).append(visit)
                visits[number, in_rank.ASYNC_WRITES] = visits[number, in_rank.WRITES]
            self._untouched[layout] = Untouched(metrics_of(folder), files_of(folder), visits)
            shutil.rmtree(folder)
        return self._untouched[layout]


@dataclass(frozen=True)
class End:
    """How the ranks of one start ended."""

    codes: list[int | None]
    """None: hung, and was killed."""
    results: list[Any]
    """Of ranks that ended well."""
    died_in: list[str]
    orphans: int
    output: str


def metrics_of(folder: Path) -> dict[str, str]:
    """Step and name -> the bits; a step that is there twice, or missing, differs too."""
    found: dict[str, str] = {}
    for record in read_metrics(folder / "logs"):
        for name in NAMES:
            key = f"step {record['step']} {name}"
            found[key] = found.get(key, "") + float(record[name]).hex()
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """The tensors and random-number states of the last checkpoint, and the export but for its card, which has paths."""
    checkpoint, exported = folder / f"checkpoints/step_{STEPS}", folder / "exported"
    files = [file for file in checkpoint.rglob("*") if file.suffix in (".distcp", ".pt")]
    files += [file for file in exported.rglob("*") if file.is_file() and file.suffix != ".md"]
    return {str(file.relative_to(folder)): _content(file) for file in sorted(files)}


def _content(file: Path) -> bytes:
    """Its bytes; of common.pt what it holds, since a pickle also tells which equal numbers were one object."""
    return repr(read_data(file, file)).encode() if file.name == COMMON_FILE else file.read_bytes()


def left_in(checkpoints: Path) -> list[str]:
    """Half written and half deleted checkpoints."""
    return [str(path) for path in checkpoints.iterdir() if path.is_dir() and path.name.startswith(".")]


def train(folder: Path, overrides: list[str], aim: tuple[int, Aim] | None, wait_s: float = 0.0) -> End:
    """Two ranks. aim: of which rank, and where. wait_s: how much later the other one is killed."""

    def start(number: int, port: int, at: Path) -> Any:
        mine = aim[1] if aim is not None and aim[0] == number else None
        call = (str(folder / "config.yaml"), overrides, mine, str(at / "died.jsonl"))
        return forked("train", call, number, 2, port, at)

    return run_ranks(2, start, wait_s)


def train_cold(folder: Path, overrides: list[str], number: int, after_s: float) -> End:
    """Two ranks that import everything themselves, of which one dies while it does."""

    def start(rank: int, port: int, at: Path) -> Any:
        output = (at / f"output_{rank}.txt").open("w")
        return subprocess.Popen(
            [sys.executable, "-m", "megadpo", "train", str(folder / "config.yaml"), *overrides],
            env=rank_environment(rank, 2, port),
            cwd=REPOSITORY,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    return run_ranks(2, start, 0.0, kill=(number, after_s))


def export(folder: Path, aim: Aim | None) -> End:
    def start(number: int, port: int, at: Path) -> Any:
        call = (str(folder / "checkpoints"), str(folder / "exported"), aim, str(at / "died.jsonl"))
        return forked("export", call, number, 1, port, at)

    return run_ranks(1, start, 0.0)


def forked(function: str, call: tuple[Any, ...], number: int, world_size: int, port: int, at: Path) -> Any:
    place = at / str(number)
    place.mkdir()
    (place / "call.pkl").write_bytes(pickle.dumps((f"tests.crash.rank:{function}", call, False)))
    return start_rank(number, world_size, port, place, {})


def run_ranks(
    count: int, start: Callable[[int, int, Path], Any], wait_s: float, kill: tuple[int, float] | None = None
) -> End:
    """Start ranks and wait; when one has died the others are killed, as a launcher does. kill: a rank, and when."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="megadpo-crash-") as name:
        at = Path(name)
        ranks = [start(number, store.port, at) for number in range(count)]
        started = time.monotonic()
        while None in (codes := [code_of(rank) for rank in ranks]) and time.monotonic() < started + LONGEST_S:
            if any(codes):
                time.sleep(wait_s)
                break
            if kill is not None and time.monotonic() - started > kill[1]:
                os.kill(ranks[kill[0]].pid, signal.SIGKILL)
                ranks[kill[0]].wait()
            time.sleep(0.01)
        ended: list[int | None] = []
        for rank in ranks:
            hung = code_of(rank) is None and not any(codes)
            if code_of(rank) is None:
                os.kill(rank.pid, signal.SIGKILL)
            rank.join() if isinstance(rank, multiprocessing.process.BaseProcess) else rank.wait()
            ended.append(None if hung else code_of(rank))
        died = at / "died.jsonl"
        died_in = [json.loads(line)["phase"] for line in died.read_text().splitlines()] if died.exists() else []
        if kill is not None and ended[kill[0]] == -signal.SIGKILL:
            died_in = [IMPORTS]
        results = [pickle.loads(file.read_bytes()) for file in sorted(at.glob("*/result_*.pkl"))]
        output = "\n".join(file.read_text(errors="replace")[-2000:] for file in sorted(at.rglob("*.txt")))
        return End(ended, results, died_in, orphans_of([rank.pid for rank in ranks]), output)


def code_of(rank: Any) -> int | None:
    code: int | None = rank.exitcode if isinstance(rank, multiprocessing.process.BaseProcess) else rank.poll()
    return code


def orphans_of(pids: Sequence[int]) -> int:
    """Processes of the sessions that these ranks led; a process that ends with its rank takes a moment for it."""
    deadline = time.monotonic() + 2.0
    while (left := in_sessions(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


def in_sessions(pids: Sequence[int]) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(") ")[2].split()[:4]
            if state != "Z" and int(session) in pids:
                found.append(int(stat.parent.name))
    return found


def kills_in_turn(seed: int, first: int, count: int) -> Iterator[tuple[int, str]]:
    """Numbers and phases: every phase comes as often as every other."""
    order = [
        phase for turn in range(first // len(PHASES), (first + count) // len(PHASES) + 1) for phase in _turn(seed, turn)
    ]
    skipped = first % len(PHASES)
    yield from enumerate(order[skipped : skipped + count], first)


def _turn(seed: int, turn: int) -> list[str]:
    return random.Random(f"{seed} turn {turn}").sample(PHASES, len(PHASES))


def draw(phase: str, untouched: Untouched, rng: random.Random) -> tuple[int, Aim]:
    """A rank and a place in the phase: before an operation on files, where it has some, or after a time."""
    number = 0 if phase in ONLY_RANK_0 else rng.randrange(2)
    if phase == in_rank.STARTING:
        return number, Aim(phase, after_s=rng.uniform(0, START_S))
    visits = untouched.visits[number, phase]
    call = rng.randint(1, min(len(visits), IN_TWO_SAVES.get(phase, 1)))
    visit = visits[call - 1]
    if visit.events and rng.random() < 0.7:
        return number, Aim(phase, call, event=rng.randint(1, visit.events))
    return number, Aim(phase, call, after_s=rng.uniform(0, visit.seconds))


def crash(world: World, plan: Sequence[tuple[int, str]], seed: int, say: Callable[[str], None]) -> Count:
    """Kill runs by the plan, and count what came of it. A kill that its run ended before is tried in the next run."""
    count, left = Count(), list(plan)
    tries = 0
    while left and tries < 4 * len(plan) and count.is_good:
        layout = [*LAYOUTS][left[0][0] // MOST_KILLS_A_RUN % len(LAYOUTS)]
        mine, left = left[:MOST_KILLS_A_RUN], left[MOST_KILLS_A_RUN:]
        tries += len(mine)
        missed = one_run(world, layout, mine, seed, count)
        left = missed + left if left else missed
        say(f"{layout}: {sum(count.kills.values())} kills, {count.runs} runs, good so far: {count.is_good}")
    count.failures += [f"kill {number} ({phase}) found no place" for number, phase in left]
    return count


def one_run(
    world: World, layout: str, kills: Sequence[tuple[int, str]], seed: int, count: Count
) -> list[tuple[int, str]]:
    """A run that is killed, started again and compared. Returns the kills that it ended before."""
    untouched, folder = world.untouched(layout), world.new_run()
    missed, ended = [], False
    for number, phase in [kill for kill in kills if kill[1] != in_rank.EXPORT]:
        if ended:
            missed.append((number, phase))
            continue
        rng = random.Random(f"{seed} kill {number}")
        asynchronous = phase == in_rank.ASYNC_WRITES or (phase != in_rank.WRITES and rng.random() < 0.5)
        overrides = [*LAYOUTS[layout], *([ASYNC] if asynchronous else [])]
        if phase == IMPORTS:
            end = train_cold(folder, overrides, rng.randrange(2), rng.uniform(0, IMPORT_S))
        else:
            end = train(folder, overrides, draw(phase, untouched, rng), rng.choice([0.0, 0.0, 0.3]))
        ended = _note(end, count, f"kill {number} ({phase}, {layout})")
        if ended:
            missed.append((number, phase))
    if not ended:
        end = train(folder, LAYOUTS[layout], None)
        if not _note(end, count, f"the last start ({layout})"):
            count.failures.append(f"{layout}: did not end: {end.codes} {end.output[-1500:]}")
            return missed
    for number, phase in [kill for kill in kills if kill[1] == in_rank.EXPORT]:
        shutil.rmtree(folder / "exported", ignore_errors=True)
        rng = random.Random(f"{seed} kill {number}")
        _note(export(folder, draw(phase, untouched, rng)[1]), count, f"kill {number} ({phase})")
        if (folder / "exported").exists() and files_of(folder) != untouched.files:
            count.differing.append(f"kill {number}: an export that was killed is there and is not whole")
    if not (folder / "exported").exists():
        _note(export(folder, None), count, "the export")
    found = {**metrics_of(folder), **files_of(folder)}
    wanted = {**untouched.metrics, **untouched.files}
    count.differing += [
        f"{layout}: {key}" for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)
    ]
    count.leftovers += left_in(folder / "checkpoints")
    count.runs += 1
    shutil.rmtree(folder)
    return missed


def _note(end: End, count: Count, what: str) -> bool:
    """Whether all ranks ended well. Another end than by our kill is a failure."""
    count.orphans += end.orphans
    if None in end.codes:
        count.failures.append(f"{what}: hung: {end.output[-1500:]}")
    if all(code == 0 for code in end.codes):
        return True
    count.restarts += 1
    count.kills.update(end.died_in)
    if not end.died_in:
        count.failures.append(f"{what}: ended with {end.codes}: {end.output[-1500:]}")
    return False
