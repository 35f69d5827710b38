"""Search of settings beyond a grid: Optuna's tree-structured Parzen estimator, told validation alone.

A suggestion is a function of the seed and of the trials before it, which the study's own folder keeps: a
search that was interrupted goes on with the suggestions it would have had.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from biopsy.core.errors import FileFormatError, MissingExtra, RecipeError
from biopsy.core.loaders import parse_toml
from biopsy.core.seeds import derive

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

N_DIGITS = 3  # of a suggested number that is not whole
_RANGE = re.compile(r"(?P<low>[^\s,]+?)\.\.(?P<high>[^\s,]+)(?P<log>\s+log)?")

Values = Mapping[str, Any]
Trial = tuple[Values, float | None]
"""Setting to value, and the score on validation (higher is better); None where training diverged."""


def read_space(search: Iterable[str]) -> "dict[str, BaseDistribution]":
    """Read ``"train.lr=1e-4..1e-1 log"`` as a setting and its range; whole ends make whole numbers.

    ``KEY=VALUE,VALUE`` is a choice among values.

    Raises:
        RecipeError: If a line is neither, a range is empty, or a setting is named again.
        MissingExtra: If Optuna is not installed.
    """
    if find_spec("optuna") is None:
        raise MissingExtra("search", "a search")
    from optuna.distributions import CategoricalDistribution

    space: dict[str, BaseDistribution] = {}
    for line in [search] if isinstance(search, str) else search:
        key, equals, text = (part.strip() for part in line.partition("="))
        if not equals or not text:
            raise RecipeError(f"--search {line!r} has no range: write --search 'train.lr=1e-4..1e-1 log'")
        if key in space:
            raise RecipeError(f"--search names {key!r} twice")
        if match := _RANGE.fullmatch(text):
            space[key] = _read_range(line, match)
        elif ".." in text or "," not in text:
            raise RecipeError(
                f"--search {line!r} is neither a range nor a choice: write 'train.lr=1e-4..1e-1 log' or "
                "'train.batch_size=32,64'"
            )
        else:
            space[key] = CategoricalDistribution([_read_value(key, value) for value in text.split(",")])
    return space


def _read_range(line: str, match: re.Match[str]) -> "BaseDistribution":
    from optuna.distributions import FloatDistribution, IntDistribution

    ends, log = (match["low"], match["high"]), match["log"] is not None
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        raise RecipeError(f"--search {line!r}: the ends of a range are numbers") from None
    if not low < high:
        raise RecipeError(f"--search {line!r}: the range is empty, its low end must be below its high end")
    if log and low <= 0:
        raise RecipeError(f"--search {line!r}: a range on a logarithmic scale begins above 0")
    if all(re.fullmatch(r"[+-]?\d+", end) for end in ends):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _read_value(key: str, text: str) -> Any:
    """Read a value as ``--set`` does: TOML, else text."""
    try:
        return parse_toml(f"value = {text.strip()}", f"--search {key}")["value"]
    except FileFormatError:
        return text.strip()


def list_ends(space: "Mapping[str, BaseDistribution]") -> list[Values]:
    """Return combinations that between them hold the ends of every range and every choice."""
    values = [getattr(d, "choices", None) or (d.low, d.high) for d in space.values()]  # type: ignore[attr-defined]
    n = max(map(len, values))
    return [
        {key: options[min(i, len(options) - 1)] for key, options in zip(space, values, strict=True)}
        for i in range(n)
    ]


def suggest(space: "Mapping[str, BaseDistribution]", trials: Sequence[Trial], *, seed: int) -> Values:
    """Return the settings of the next trial.

    Args:
        space: As `read_space` gives it.
        trials: Those before it, in order.
        seed: Same seed, space and trials give the same suggestion.
    """
    import optuna

    sampler = optuna.samplers.TPESampler(seed=derive(seed, "search", len(trials)) % 2**32)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize", sampler=sampler)
        state = optuna.trial.TrialState
        for values, score in trials:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(values),
                    distributions=dict(space),
                    value=score,
                    state=state.FAIL if score is None else state.COMPLETE,
                )
            )
        suggested = study.ask(dict(space)).params
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {key: _round(suggested[key], space[key]) for key in space}


def _round(value: Any, distribution: "BaseDistribution") -> Any:
    from optuna.distributions import FloatDistribution

    if not isinstance(distribution, FloatDistribution):
        return value
    return min(max(float(f"{value:.{N_DIGITS}g}"), distribution.low), distribution.high)
