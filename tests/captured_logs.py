"""What is logged during a test.

It stands in for pytest's own capture, which attaches to the loggers of all libraries at each phase of each
test, 7 ms in all.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class CapturedLogs(logging.Handler):
    """The records that reach the root logger, as `pytest.LogCaptureFixture` holds them."""

    def __init__(self) -> None:
        super().__init__(0)
        self.records: list[logging.LogRecord] = []
        self.levels: dict[logging.Logger, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        """The messages, one per record."""
        return [record.getMessage() for record in self.records]

    @property
    def text(self) -> str:
        """The records as lines, with level, logger and message."""
        return "".join(f"{r.levelname} {r.name}: {r.getMessage()}\n" for r in self.records)

    def clear(self) -> None:
        """Forget the records."""
        self.records.clear()

    def set_level(self, level: int | str, logger: str | None = None) -> None:
        """Set the level of a logger (default: the root) and of what is captured until the end of the test."""
        target = logging.getLogger(logger)
        self.levels.setdefault(target, target.level)
        target.setLevel(level)
        self.setLevel(level)

    @contextmanager
    def at_level(self, level: int | str, logger: str | None = None) -> Iterator[None]:
        """Set the level of a logger (default: the root) and of what is captured within a block."""
        target = logging.getLogger(logger)
        before = target.level, self.level
        target.setLevel(level)
        self.setLevel(level)
        try:
            yield
        finally:
            target.setLevel(before[0])
            self.setLevel(before[1])


@contextmanager
def capture_logs() -> Iterator[CapturedLogs]:
    """Capture what is logged within a block; levels are restored."""
    captured = CapturedLogs()
    loggers = [logging.getLogger()]
    if not (own := logging.getLogger("biopsy")).propagate:
        loggers.append(own)
    for logger in loggers:
        logger.addHandler(captured)
    try:
        yield captured
    finally:
        for logger in loggers:
            logger.removeHandler(captured)
        for logger, level in captured.levels.items():
            logger.setLevel(level)
