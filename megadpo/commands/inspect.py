"""Show the data of a run as the model sees it: megadpo inspect CONFIG [key=value ...]

Prints how many rows of the file were used or dropped, the lengths, how many tokens shared prompts save, how full the packs
are, how evenly data-parallel ranks are loaded, and one pair as the model sees it: every token with its position, its
segment, and whether the loss counts it.
Needs the model's config.json and tokenizer, but no weights and no GPU. Writes tokens to data.cache_dir, as training does.
Exit code 2: refused, with every problem on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megadpo.commands import command_parser, positive
from megadpo.config.architecture import Architecture
from megadpo.config.check import check_layout, stated_world_size
from megadpo.config.grid import Grid
from megadpo.config.load import load_config
from megadpo.config.no_effect import without_experts
from megadpo.config.problems import ConfigError, DataError, Problem
from megadpo.config.schema import HOLDOUT, Config
from megadpo.families import read_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megadpo.data.batches.loader import GlobalBatchLoader
    from megadpo.data.pairs import OpenedPairs
    from megadpo.data.statistics import SeenSegment, SeenToken

Written: TypeAlias = "tuple[SeenToken, str]"
"""A token and its text."""

TRAIN = "train"
_WIDTH_WITHOUT_TERMINAL = 120
_GUTTER = 9  # columns before a line's first token, for its position
_STYLES = {"chosen": "bold green", "rejected": "bold red"}


def main(arguments: Sequence[str]) -> int:
    """Print; returns the exit code. Raises UserError."""
    options = parse(arguments)
    plain = not sys.stdout.isatty()
    console = Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL if plain else None)
    show(options, console)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("config", help="YAML file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. policy.sequence_packing.train_mb_tokens=8192")
    parser.add_argument("--set", default=TRAIN, help="train (the default), a name of data.val_data_paths, or holdout")
    parser.add_argument("--pair", type=int, default=None, help="row of the file, from 0 (default: the first pair)")
    parser.add_argument("--batches", type=int, default=10, help="global batches to plan (default 10)")
    parser.add_argument(
        "--world-size", type=positive, help="ranks of the run (default: cluster's, or as few as hold the model)"
    )
    parser.add_argument("--all-tokens", action="store_true", help="show long segments whole")
    options = parser.parse_intermixed_args(arguments)
    if options.batches < 0:
        parser.error(f"--batches {options.batches}: a number of batches, 0 for none")
    return options


def show(options: argparse.Namespace, console: Console) -> None:
    """Raises UserError."""
    from megadpo.model.source import resolve_source
    from megadpo.train import inputs

    cfg = load_config(
        options.config, options.overrides, purpose="train" if options.set in (TRAIN, HOLDOUT) else "evaluate"
    )
    name = _set(cfg, options.set, inputs.TRAIN)
    source = resolve_source(cfg.policy.model_name, "policy.model_name", weights=False)
    arch = read_architecture(source.hf_files)
    grid = _grid(without_experts(cfg, arch), arch, options.world_size)
    opened = inputs.open_run_inputs(cfg, grid, sets=[name], weights=False)
    loader = opened.loaders[name]
    dataset = loader.dataset
    position = _position(dataset, options.pair)
    for note in cfg.notes:
        console.print(Text(note, style="dim"))
    for report in dataset.reports:
        console.print(Text(str(report)))
    show_lengths(console, dataset, loader)
    show_packs(console, loader, options.batches)
    show_pair(
        console, dataset, position, opened.tokenizer, loader.options.share_prompt, 10**9 if options.all_tokens else 400
    )


def _set(cfg: Config, name: str, training: str) -> str:
    """The set's name among a run's inputs, which call the training set `training`."""
    names = [TRAIN, *cfg.data.val_names]
    if name not in names:
        raise ConfigError(Problem("--set", name, f"one of {', '.join(names)}", "name one of these"))
    return training if name == TRAIN else name


def _grid(cfg: Config, arch: Architecture, world_size: int | None) -> Grid:
    size = world_size or stated_world_size(cfg) or Grid.of(cfg).model_ranks
    problems = check_layout(cfg, arch, size)
    if problems:
        raise ConfigError(problems)
    return Grid.of(cfg, size)


def _position(dataset: OpenedPairs, row: int | None) -> int:
    """The data set's index of the pair in row `row` of the file."""
    if row is None:
        return 0
    found = np.flatnonzero(dataset.rows == row)
    if len(found) == 0:
        expected = f"a row of {dataset.report.path}, from 0 to {dataset.report.rows - 1}, that was not dropped"
        raise DataError(Problem("--pair", row, expected, "name another row"))
    return int(found[0])


def show_lengths(console: Console, dataset: OpenedPairs, loader: GlobalBatchLoader) -> None:
    """Lengths of texts, tokens that shared prompts save, and how often the chosen answer is the longer one."""
    from megadpo.data.statistics import group_counts, lengths, share_chosen_longer

    table = Table("tokens", box=None, pad_edge=False)
    for column in ("mean", "median", "90%", "99%", "longest", "total"):
        table.add_column(column, justify="right")
    for row in lengths(dataset, share_prompt=loader.options.share_prompt):
        numbers = (row.mean, row.median, row.percent_90, row.percent_99, row.longest, row.total)
        table.add_row(row.name, *(f"{number:,.0f}" for number in numbers))
    console.print()
    console.print(table)
    saving = f"{dataset.report.shared_prompt_saving:.1%} of the tokens"
    off = "sharing prompts would save" if not loader.options.share_prompt else "shared prompts save"
    console.print(f"{off} {saving}; chosen is longer than rejected in {share_chosen_longer(dataset):.1%} of the pairs")
    if loader.groups is not None:
        groups = group_counts(loader.groups)
        console.print(
            f"groups: {len(loader.groups):,} pairs of {groups.answers:,} answers to {groups.prompts:,} prompts, computed once "
            f"each: {groups.tokens:,} tokens, where pairs alone would take {groups.tokens_alone:,} ({groups.saving:.1f} times)"
        )
        if groups.tokens_in_common:
            share = groups.tokens_in_common / (groups.tokens + groups.tokens_in_common)
            console.print(
                f"answers that begin alike: {groups.tokens_in_common:,} tokens less ({share:.1%}) than each answer whole"
            )


def show_packs(console: Console, loader: GlobalBatchLoader, count: int) -> None:
    """A row for each of the first `count` global batches, and their means."""
    from megadpo.data.statistics import batch_fills

    fills = batch_fills(loader, count)
    budget = loader.budget_tokens
    packs = (
        f"packs of at most {budget:,} tokens"
        if budget
        else f"{loader.options.pairs_per_micro_batch} pairs a micro-batch"
    )
    title = (
        f"Global batches of {loader.options.global_batch_size} pairs: {packs}, {loader.grid.data} data-parallel rank(s)"
    )
    table = Table("batch", box=None, pad_edge=False)
    columns = ["pairs", "tokens", "micro-batches a rank", "filled", "least loaded rank does"]
    if loader.grid.context > 1:
        title += f", {loader.grid.context} context-parallel ranks"
        columns.append("attention of the busiest context rank")
    for column in columns:
        table.add_column(column, justify="right")
    for fill in fills:
        table.add_row(
            str(fill.batch), f"{fill.pairs:,}", f"{fill.tokens:,}", str(fill.micro_batches), _percent(fill.fill),
            _percent(1 - fill.imbalance), *([] if fill.context_imbalance is None else [f"{fill.context_imbalance:.2f} x mean"]),
        )  # fmt: skip
    if len(fills) > 1:
        mean = [
            float(np.mean([one.fill or 0.0 for one in fills])),
            float(np.mean([1 - one.imbalance for one in fills])),
        ]
        table.add_row("mean", "", "", "", _percent(mean[0] if budget else None), _percent(mean[1]))
    console.print()
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print(
        f"{len(fills)} of the epoch's {loader.batches_per_epoch:,} batches; work is counted as in megadpo/data/batches/work.py"
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def show_pair(
    console: Console,
    dataset: OpenedPairs,
    position: int,
    tokenizer: PreTrainedTokenizerBase,
    share_prompt: bool,
    most: int,
) -> None:
    """Every segment of one pair, token by token; tokens that the loss counts are in colour."""
    from megadpo.data.statistics import as_seen

    pair = dataset[position]
    marks = "in colour" if console.color_system else "between « and »"
    console.print()
    console.print(Text(f"Pair {pair.index} ({dataset.source_of(pair.index)}); tokens that the loss counts are {marks}"))
    decode = _decoder(tokenizer)
    for segment in as_seen(pair, share_prompt=share_prompt):
        console.print()
        console.print(Text(_headline(segment), style="bold"))
        plain = console.color_system is None
        for line in _lines(segment, decode, most, width=console.width - 2, plain=plain):
            console.print(line, soft_wrap=True)


def _headline(segment: SeenSegment) -> str:
    end = segment.start + len(segment.tokens)
    seen = " and ".join(f"[{start}, {stop})" for start, stop in segment.keys)
    learned = sum(token.learned for token in segment.tokens)
    return f"{segment.name}: [{segment.start}, {end}) of the pack, sees {seen}; {learned} tokens in the loss"


def _lines(segment: SeenSegment, decode: Callable[[int], str], most: int, *, width: int, plain: bool) -> Iterator[Text]:
    """The segment's tokens with | between them; each line begins with the position of its first token."""
    tokens = segment.tokens
    cut = len(tokens) > most
    for line in _filled(tokens[: most // 2] if cut else tokens, decode, width):
        yield _line(segment, line, plain=plain)
    if cut:
        left_out = len(tokens) - most // 2 * 2
        yield Text(f"         ... {left_out:,} tokens more: --all-tokens", style="dim")
        for line in _filled(tokens[-(most // 2) :], decode, width):
            yield _line(segment, line, plain=plain)


def _filled(tokens: Sequence[SeenToken], decode: Callable[[int], str], width: int) -> Iterator[list[Written]]:
    """Lines of tokens and their texts, no wider than `width` where a token allows it."""
    line: list[Written] = []
    used = _GUTTER
    for token in tokens:
        written = (token, decode(token.token_id))
        used += cell_len(written[1]) + 1
        if line and used > width:
            yield line
            line, used = [], _GUTTER + cell_len(written[1]) + 1
        line.append(written)
    if line:
        yield line


def _line(segment: SeenSegment, line: Sequence[Written], *, plain: bool) -> Text:
    style = next((style for name, style in _STYLES.items() if name in segment.name), "")
    text = Text(f"{line[0][0].position:>{_GUTTER - 3}}  ", style="cyan")
    for number, (learned, run) in enumerate(groupby(line, key=lambda written: written[0].learned)):
        marks = ("«", "»") if plain and learned else ("", "")
        text.append("|" if number else "", style="dim")
        text.append(marks[0])
        for place, (_, piece) in enumerate(run):
            text.append("|" if place else "", style="dim")
            text.append(piece, style=style if learned else "default")
        text.append(marks[1])
    return text


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """A function from a token id to its text without control characters. A token that is only part of a character gives
    the vocabulary's own form of it."""

    def decode(token_id: int) -> str:
        text = str(tokenizer.decode([token_id]))
        if not text or "\ufffd" in text:
            text = str(tokenizer.convert_ids_to_tokens(token_id))
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)

    return decode
