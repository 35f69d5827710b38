"""The result of checks: one row per check, with the remedy for those that did not pass."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from biopsy.core.errors import BiopsyError, MissingExtra
from biopsy.core.results import FAILED, Result

if TYPE_CHECKING:
    import pandas as pd

FORMAT: Final = "biopsy-checks/1"

Status = Literal["PASS", "WARN", "FAIL"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        status: ``PASS``, ``WARN`` (not checked, or suboptimal) or ``FAIL``.
        detail: The finding, with the tolerance of numerical comparisons.
        remedy: What to do; empty if the check passed.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class CheckReport(Result):
    """Result of `verify` and `doctor`.

    ``report["checks"]`` lists ``name``, ``status``, ``detail`` and ``remedy`` of every check,
    ``report["status"]`` is the worst of them, ``report["subject"]`` what was checked.
    """

    subject: str
    checks: Sequence[Check]

    @classmethod
    def of(cls, subject: str, checks: Sequence[Check]) -> "CheckReport":
        """Return the report of some checks."""
        result = {check.status for check in checks}
        worst = next((status for status in ("FAIL", "WARN") if status in result), "PASS")
        rows = [asdict(check) for check in checks]
        document = {"format": FORMAT, "subject": subject, "status": worst, "checks": rows}
        return cls(document, subject, checks)

    @property
    def passed(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return self["status"] != "FAIL"

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else FAILED

    def blocks(self) -> list[str]:
        """Return a line per check, the remedy below it, and the number of checks of each status."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.status}  {check.name:<{width}}  {check.detail}")
            if check.remedy:
                lines.append(f"      {'':<{width}}  -> {check.remedy}")
        statuses = [check.status for check in self.checks]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in ("PASS", "WARN", "FAIL"))
        return [*lines, f"{self.subject}: {counts}"]

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per check: ``status``, ``detail`` and ``remedy`` by ``name``."""
        import pandas as pd

        return pd.DataFrame(self.checks).set_index("name")


class Checklist(list[Check]):
    """A list of checks; the message of a raised error becomes the detail of a check."""

    def add(self, name: str, status: Status, detail: str, remedy: str = "") -> None:
        """Add a check with its outcome."""
        self.append(Check(name, status, detail, "" if status == "PASS" else remedy))

    def run(self, name: str, function: Callable[[], tuple[str, Value]], remedy: str) -> Value | None:
        """Add a check that passes unless its function raises.

        Args:
            function: Returns the detail and a value.
            remedy: What to do if it raises.

        Returns:
            The value of the function; None if the check did not pass.
        """
        try:
            detail, value = function()
        except MissingExtra as error:
            self.add(name, "WARN", f"not checked: {error}", "install the extra, then verify again")
        except (BiopsyError, OSError) as error:
            self.add(name, "FAIL", str(error), remedy)
        else:
            self.add(name, "PASS", detail)
            return value
        return None

    def require(self, name: str, condition: bool, detail: str, remedy: str) -> None:
        """Add a check that passes if a condition is true."""
        self.add(name, "PASS" if condition else "FAIL", detail, remedy)


def describe_differences(expected: Any, actual: Any, path: str = "") -> list[str]:
    """Return where two JSON documents differ, as dotted names of entries."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        keys = [*expected, *(key for key in actual if key not in expected)]
        missing = object()
        pairs = ((f"{path}.{key}", expected.get(key, missing), actual.get(key, missing)) for key in keys)
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        pairs = ((f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(expected, actual, strict=True)))
    else:
        return [] if expected == actual else [path.removeprefix(".")]
    return [name for entry, a, b in pairs for name in describe_differences(a, b, entry)]
