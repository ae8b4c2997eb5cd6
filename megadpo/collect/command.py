"""What `megadpo collect` does: checks, the run, and what is said at its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadpo.collect.client import JsonClient
from megadpo.collect.collector import Collector
from megadpo.collect.journal import Journal
from megadpo.collect.options import CollectOptions, api_key, parse_options
from megadpo.collect.policy import Policy, model_to_ask
from megadpo.collect.progress import CollectProgress
from megadpo.collect.rewards import RewardFunction, by_function, by_server, load_reward_function
from megadpo.collect.sampling import not_sampling
from megadpo.collect.tasks import Tasks, read_tasks
from megadpo.config.problems import ConfigError, DataError, Problem

INCOMPLETE = 1
"""Exit code of a collection in which rollouts are missing."""
_FINGERPRINTED = ("policy_api", "num_repeats", "num_repeats_add_seed", "limit", "agent_name", "reward_function")


@dataclass(frozen=True)
class Collection:
    """A checked collection."""

    options: CollectOptions
    tasks: Tasks
    reward_function: RewardFunction | None


def collect(arguments: Sequence[str]) -> int:
    """Checks and collects. Returns the exit code: 0 if every rollout is in the output file, INCOMPLETE if some failed, 128 +
    signal if it was stopped. Raises UserError with every problem if it can't start."""
    job = check(arguments)
    try:
        return asyncio.run(_run_until_signal(job))
    except OSError as error:
        print(f"stopped: {error.strerror or error} ({error.filename or job.options.journal})")
        print(f"finished rollouts are in {job.options.journal}; the same command continues from there")
        return INCOMPLETE


def check(arguments: Sequence[str]) -> Collection:
    """Checks options, input file and reward function. Raises UserError with the problems of all three."""
    options = parse_options(arguments)
    problems: list[Problem] = []
    tasks, function = None, None
    try:
        tasks = read_tasks(options)
    except DataError as error:
        problems += error.problems
    try:
        function = load_reward_function(options.reward_function) if options.reward_function else None
    except ConfigError as error:
        problems += error.problems
    output = Path(options.output_jsonl_fpath)
    if output.exists() and not options.journal.exists() and options.resume_from_cache:
        fix = "name another file, or give resume_from_cache=false to replace this one"
        problems.append(Problem("output_jsonl_fpath", str(output), "a file of this collection (it has a journal)", fix))
    if problems or tasks is None:
        raise DataError(problems)
    return Collection(options, tasks, function)


async def _run_until_signal(job: Collection) -> int:
    """Runs the collection. Ctrl-C and SIGTERM (which Slurm sends) stop it cleanly."""
    task = asyncio.current_task()
    assert task is not None
    received: list[int] = []
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        received.append(number)
        loop.remove_signal_handler(number)  # a second signal ends the process as usual
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
            loop.add_signal_handler(number, stop, number)
    try:
        return await _run(job)
    except asyncio.CancelledError:
        if not received:
            raise
        print(
            f"stopped by a signal; finished rollouts are in {job.options.journal}; the same command continues from there"
        )
        return 128 + received[0]


async def _run(job: Collection) -> int:
    options = job.options
    async with contextlib.AsyncExitStack() as stack:
        shared: dict[str, Any] = {
            "timeout_s": options.request_timeout_s,
            "max_attempts": options.max_attempts,
            "retry_wait_s": options.retry_wait_s,
            "connections": options.num_samples_in_parallel,
        }
        shown: list[CollectProgress] = []  # the bar starts after the first request, which lists the models

        def on_retry(reason: str) -> None:
            if shown:
                shown[0].retry(reason)

        client = JsonClient(
            options.policy_base_url, kind="request", api_key=api_key(options), on_retry=on_retry, **shared
        )
        await stack.enter_async_context(client)
        model = await model_to_ask(client, options.policy_base_url, options.policy_model_name)
        journal = stack.enter_context(
            Journal(options.journal, fingerprint(job, model), restart=not options.resume_from_cache)
        )
        if journal.finished_rows is not None:
            return _finished_before(options, journal.finished_rows)
        if job.reward_function is not None:
            score = by_function(job.reward_function, options.num_samples_in_parallel)
        else:
            assert options.resources_server_url is not None
            # Without the key, which is for the model server
            verifier = JsonClient(options.resources_server_url, kind="reward", on_retry=on_retry, **shared)
            score = by_server(await stack.enter_async_context(verifier))
        _print_start(job, model, journal)
        rewards = [entry.reward for entry in journal.done.values()]
        progress = CollectProgress(job.tasks.rollouts, done=len(rewards), reward_sum=sum(rewards))
        shown.append(progress)
        failures = stack.enter_context(options.failures.open("wb"))
        collector = Collector(
            job.tasks,
            Policy(client, options.policy_api, model),
            score,
            journal,
            failures,
            progress,
            parallel=min(options.num_samples_in_parallel, job.tasks.rollouts),
            add_seed=options.num_repeats_add_seed,
            stop_after_failures=options.stop_after_failures,
        )
        with progress:
            await collector.run()
        return _finish(options, journal, progress, stopped=collector.stopped)


def fingerprint(job: Collection, model: str) -> dict[str, Any]:
    """The settings that must be equal in a resumed collection. Addresses, parallelism, time-outs and attempts may change:
    they don't change the distribution of answers. It has no secrets."""
    options = job.options
    found: dict[str, Any] = {"input_jsonl_fpath (sha256 of its rows)": job.tasks.sha256, "policy_model_name": model}
    found |= {name: getattr(options, name) for name in _FINGERPRINTED}
    found["resources_server_url (whether given)"] = options.resources_server_url is not None
    for name, value in options.responses_create_params.items():
        found[f"responses_create_params.{name}"] = value
    return found


def _print_start(job: Collection, model: str, journal: Journal) -> None:
    options, tasks = job.options, job.tasks
    print(f"Found {tasks.rows:,} rows!")
    if options.num_repeats > 1:
        rows = f"from {tasks.rows:,} to {tasks.rollouts:,}"
        print(f"Repeating rows (in a pattern of abc to aabbcc) {rows}!")
    if journal.done or journal.answers:
        print(f"Resuming: {len(journal.done):,} rollouts are finished, {len(journal.answers):,} lack only their reward")
    concurrent = f"{options.num_samples_in_parallel} concurrent requests"
    print(f"Querying {model} by {options.policy_api} with {concurrent}", flush=True)


def _finished_before(options: CollectOptions, rows: int) -> int:
    output = Path(options.output_jsonl_fpath)
    if not output.exists():
        fix = f"restore it, or delete {options.journal} to collect again"
        expected = f"the file with the {rows:,} rollouts that an earlier run has written"
        raise ConfigError(Problem("output_jsonl_fpath", f"{output}, which doesn't exist", expected, fix))
    print(f"nothing to do: {output} has all {rows:,} rollouts")
    return 0


def _finish(options: CollectOptions, journal: Journal, progress: CollectProgress, *, stopped: bool) -> int:
    """Writes the output file and prints a summary."""
    missing = progress.total - len(journal.done)
    if not missing:
        options.failures.unlink(missing_ok=True)
    if journal.done:
        journal.write_output(Path(options.output_jsonl_fpath))
        print(f"wrote {len(journal.done):,} rollouts to {options.output_jsonl_fpath}")
        print(summary(journal))
        for line in not_sampling((task, one.answer, one.temperature) for (task, _), one in journal.done.items()):
            print(line)
    if not missing:
        journal.mark_finished()
        return 0
    print(f"missing: {missing:,} of {progress.total:,} rollouts; reasons: {options.failures}")
    early = " (stopped early, before the rest was asked)" if stopped else ""
    print(f"{progress.failed:,} failed{early}; the same command asks only for the missing rollouts")
    return INCOMPLETE


def summary(journal: Journal) -> str:
    """A text with the mean reward, and the number of prompts that can give a pair: those with different rewards."""
    low: dict[int, float] = defaultdict(lambda: float("inf"))
    high: dict[int, float] = defaultdict(lambda: float("-inf"))
    for (task, _), entry in journal.done.items():
        low[task], high[task] = min(low[task], entry.reward), max(high[task], entry.reward)
    mean = sum(entry.reward for entry in journal.done.values()) / len(journal.done)
    apart = sum(low[task] < high[task] for task in low)
    return f"mean reward {mean:.4f}; {apart:,} of {len(low):,} prompts have answers with different rewards"
