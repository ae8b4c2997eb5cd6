"""Variants: parts of a run that the config chooses by name. Each is one file with its options, rules and refusals.

A kind of variant (losses, model families, attention kernels, ...) is a `Variants` object, with the package of its files. The
files are imported when they are first needed. To add a variant, add a file to the package, or name a file anywhere in the
config key `plugins`. The schema, docs/config.md, the config check and all refusals read this register; there is no second
list of names.

A variant is a dataclass whose fields are its options (with docs below the fields, as in the schema), or a module-level
object without options. It may have `problems(known)`, which yields a Problem for everything that it can't do, from what is
known (known.py): the config alone, or also the model's architecture, the number of processes and the machine.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from megadpo.config.problems import ConfigError, Problem

V = TypeVar("V")


@dataclass(frozen=True)
class Key:
    """A key of a config section: a field of its dataclass, or an option of a variant."""

    annotation: Any
    default: Any
    """dataclasses.MISSING: required."""
    owner: type
    """The class whose source has the key's meaning below the field."""
    meaning: str | None = None
    """The meaning, for a key without a field."""


class Variants(Generic[V]):
    """The variants of one kind, by name."""

    def __init__(
        self, what: str, package: str, *, field: str = "", options: str = "", notes_unread: bool = False
    ) -> None:
        """what: the kind's name in messages, such as "loss". package: the package or module with the variants.
        field: the config key that chooses one. options: the schema's field that holds their options.
        notes_unread: whether an option that the chosen variant doesn't read gives a note. Else it is refused."""
        self.what = what
        self.field = field
        self.notes_unread = notes_unread
        self._section = field.rpartition(".")[0]
        self._package = package
        self._options = options
        self._variants: dict[str, V] = {}
        self._keys: dict[str, Key] | None = None
        self._loaded = False

    def add(self, name: str) -> Callable[[V], V]:
        """Decorator: registers a variant. Raises ValueError if the name is taken."""

        def register(variant: V) -> V:
            if name in self._variants:
                raise ValueError(f"there is a {self.what} {name!r} already")
            self._variants[name] = variant
            self._keys = None
            return variant

        return register

    def remove(self, name: str) -> None:
        """Removes a variant. For tests, which add their own."""
        del self._variants[name]
        self._keys = None

    def names(self) -> tuple[str, ...]:
        """All names: of a package in alphabetical order, of a single module in the order of its source."""
        return tuple(self._all())

    def __iter__(self) -> Iterator[V]:
        return iter(self._all().values())

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __getitem__(self, name: str) -> V:
        return self._all()[name]

    def configured(self, name: str, options: Mapping[str, Any]) -> Any:
        """The variant `name` with its options, taken from `options`."""
        variant: Any = self[name]
        own = {key: options[key] for key in variant_options(variant) if key in options}
        made = variant(**own) if isinstance(variant, type) else variant
        return made.made_of(options) if hasattr(made, "made_of") else made  # for a variant that combines others

    def keys(self) -> dict[str, Key]:
        """The keys that the variants add to a section: every option of every variant.

        Variants that share an option inherit it from one class. Raises ValueError where two declare it.
        """
        if self._keys is None:
            variants = self._all()  # first, because registering a variant resets the keys
            keys: dict[str, Key] = {}
            for name, variant in variants.items():
                for option, key in self._keys_of(name, variant).items():
                    if keys.setdefault(option, key).owner is not key.owner:
                        raise ValueError(f"two {self.what} classes declare the option {option!r}")
            self._keys = keys
        return self._keys

    def defaults(self) -> dict[str, Any]:
        """Every option of every variant at its default."""
        return {name: key.default for name, key in self.keys().items()}

    def readers(self, option: str) -> list[str]:
        """The variants that have `option`."""
        return [name for name, variant in self._all().items() if option in variant_options(variant)]

    def chosen(self, cfg: Any) -> Any | None:
        """The variant that the config names, with its options; None if it names none (auto)."""
        name = value_at(cfg, self.field)
        return self.configured(name, self._given(cfg)) if name in self else None

    def unread(self, cfg: Any) -> Iterator[tuple[str, Any, list[str]]]:
        """(path, value, names of the variants that read it) of each option that isn't at its default and that the chosen
        variant doesn't have."""
        chosen = self.chosen(cfg)
        if chosen is None:  # every variant may be used
            return
        for name, value in self._given(cfg).items():
            if value != self.keys()[name].default and not hasattr(chosen, name):
                yield f"{self._section}.{name}", value, self.readers(name)

    def problems(self, known: Any) -> Iterator[Problem]:
        """The refusals of the variant that would run, and options that it doesn't read. If every variant may run (the config
        names none, and none has a priority): the refusals of all, each once. known: a Known (known.py)."""
        found = [problem for variant in self._may_run(known) for problem in _problems_of(variant, known)]
        yield from dict.fromkeys(found)
        if self.notes_unread:
            return
        for where, value, readers in self.unread(known.cfg):
            expected = f"nothing with {self.field} {value_at(known.cfg, self.field)}; read by {', '.join(readers)}"
            yield Problem(where, value, expected, f"remove it, or set {self.field}: {' or '.join(readers)}")

    def choose(self, known: Any) -> Any:
        """The variant that runs, with its options: the one that the config names. With auto: the one with the highest
        `priority` that doesn't refuse to be chosen here. Raises ConfigError with its refusals."""
        if problems := list(self.problems(known)):
            raise ConfigError(problems)
        return self._would_run(known)

    def _may_run(self, known: Any) -> list[Any]:
        one = self._would_run(known)
        if one is None and not self._priorities():
            return [self.configured(name, self._given(known.cfg)) for name in self.names()]
        return [] if one is None else [one]

    def _priorities(self) -> dict[str, int]:
        priorities = {name: getattr(variant, "priority", None) for name, variant in self._all().items()}
        return {name: priority for name, priority in priorities.items() if priority is not None}

    def _would_run(self, known: Any) -> Any | None:
        chosen = self.chosen(known.cfg)
        if chosen is not None:
            return chosen
        usual = self._priorities()
        for name in sorted(usual, key=lambda name: -usual[name]):
            variant = self.configured(name, self._given(known.cfg))
            if all(problem.where != self.field for problem in _problems_of(variant, known)):
                return variant
        return None

    def _keys_of(self, name: str, variant: V) -> dict[str, Key]:
        return variant_options(variant)

    def _given(self, cfg: Any) -> Mapping[str, Any]:
        return getattr(value_at(cfg, self._section), self._options) if self._options else {}

    def _all(self) -> dict[str, V]:
        if not self._loaded:
            self._loaded = True  # first, because a module of the package may call this while it is imported
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
                importlib.import_module(f"{self._package}.{module.name}")
            if hasattr(package, "__path__"):  # sorted, because some module may have been imported before the others
                self._variants = dict(sorted(self._variants.items()))
        return self._variants


class SwitchedVariants(Variants[V]):
    """Variants that a run may have several of. `<name>_enabled` switches one on; the section `<name>` has its options.

    A variant is a dataclass. The first line of its docstring is the meaning of `<name>_enabled`.
    """

    def __init__(self, what: str, package: str, *, section: str, options: str) -> None:
        """section: the path of the section with the switches and the variants' sections. options: the schema's field in
        that section for both."""
        super().__init__(what, package, options=options)
        self._section = section

    def enabled(self, options: Mapping[str, Any]) -> list[Any]:
        """The variants that are switched on, with their options. options: the value of the schema's field."""
        return [options[name] for name in self.names() if options[f"{name}_enabled"]]

    def problems(self, known: Any) -> Iterator[Problem]:
        """The refusals of the variants that are switched on. known: a Known (known.py)."""
        for variant in self.enabled(self._given(known.cfg)):
            yield from _problems_of(variant, known)

    def _keys_of(self, name: str, variant: V) -> dict[str, Key]:
        assert isinstance(variant, type) and dataclasses.is_dataclass(variant)
        summary = (inspect.getdoc(variant) or "").partition("\n")[0]
        return {
            f"{name}_enabled": Key(bool, False, variant, summary),
            name: Key(variant, variant(), variant),
        }


@dataclass(frozen=True)
class OneOf:
    """Marks a text that must be a variant's name, or one of `others`."""

    kind: Variants[Any]
    others: tuple[str, ...] = ()

    def allowed(self) -> tuple[str, ...]:
        return (*self.others, *self.kind.names())


@dataclass(frozen=True)
class OptionsOf:
    """Marks a field that holds the options of a kind's variants. In a file they are keys of the section."""

    kind: Variants[Any]


def variant_options(variant: Any) -> dict[str, Key]:
    """The options of a variant; empty if it is no dataclass."""
    if not isinstance(variant, type) or not dataclasses.is_dataclass(variant):
        return {}
    hints = get_type_hints(variant, include_extras=True)
    options = {}
    for field in dataclasses.fields(variant):
        owner = next(cls for cls in reversed(variant.__mro__) if field.name in inspect.get_annotations(cls))
        options[field.name] = Key(hints[field.name], default_of(field), owner)
    return options


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass's field, or the result of its factory; dataclasses.MISSING for a required field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _problems_of(variant: Any, known: Any) -> Iterator[Problem]:
    problems = getattr(variant, "problems", None)
    if problems is not None:
        yield from problems(known)


class Lazy:
    """A module that is imported at its first use. (Formulas need torch; a config check must not import it.)"""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def import_plugins(names: Sequence[str]) -> None:
    """Imports Python files (by path) and modules (by dotted name) that add variants, each once. They are executed.

    Raises ConfigError with all that can't be imported.
    """
    problems = []
    for name in names:
        try:
            _import_plugin(name)
        except Exception as error:  # a plugin may raise any exception
            fix = "correct the name, or the file"
            expected = f"a Python file or module that can be imported ({type(error).__name__}: {error})"
            problems.append(Problem("plugins", name, expected, fix))
    if problems:
        raise ConfigError(problems)


def _import_plugin(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    path = Path(name).expanduser().resolve()
    module_name = f"megadpo_plugin_{path.stem}_{abs(hash(str(path))):x}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def value_at(cfg: Any, path: str) -> Any:
    """The value of a dotted key, also of a variant's option. Raises AttributeError for an unknown key."""
    for name in path.split("."):
        holders = option_fields(cfg.__class__)
        held = next((getattr(cfg, field) for field, kind in holders.items() if name in kind.keys()), None)  # noqa: SIM118
        cfg = getattr(cfg, name) if held is None else held[name]
    return cfg


@functools.cache
def option_fields(section: Any) -> dict[str, Variants[Any]]:
    """Field -> kind, for the fields of a section that hold options of variants."""
    if not dataclasses.is_dataclass(section):
        return {}
    hints = get_type_hints(section, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: mark.kind for name, found in marks.items() for mark in found if isinstance(mark, OptionsOf)}


LOSSES: Variants[Any] = Variants("loss", "megadpo.objective.losses", field="dpo.loss_type", options="loss_options")
FORMATS: Variants[Any] = Variants(
    "format of rows", "megadpo.data.formats", field="data.dataset_name", options="format_options"
)
FAMILIES: Variants[Any] = Variants("model family", "megadpo.families")
OPTIMIZERS: Variants[Any] = Variants(
    "optimizer",
    "megadpo.optimizer.kinds",
    field="policy.megatron_cfg.optimizer.optimizer",
    options="options",
    notes_unread=True,
)
LOGGERS: SwitchedVariants[Any] = SwitchedVariants(
    "logger", "megadpo.train.loggers", section="logger", options="loggers"
)
ATTENTION_KERNELS: Variants[Any] = Variants(
    "attention kernel", "megadpo.model.kernels", field="policy.attention_kernel"
)
LOGPROB_KERNELS: Variants[Any] = Variants("head", "megadpo.model.heads", field="policy.logprob_kernel")
LAYER_IMPLEMENTATIONS: Variants[Any] = Variants(
    "layer implementation", "megadpo.model.layers", field="policy.megatron_cfg.transformer_impl"
)
KINDS: tuple[Variants[Any], ...] = (
    *(LOSSES, FORMATS, ATTENTION_KERNELS, LOGPROB_KERNELS, LAYER_IMPLEMENTATIONS, OPTIMIZERS, LOGGERS),
)
"""Every kind that a config key chooses from."""
