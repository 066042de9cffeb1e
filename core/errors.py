"""The error tree. A message reads `stage: what is wrong, got X, expected Y; next step`.

StepwellError
├── ConfigError      before any work: usage, schema, paths, credentials (exit 2)
├── InputError       one input or document cannot be used (becomes a counted reject)
├── RetryableError   the same call may succeed later (bounded retries)
└── StageError       the stage must stop; what was committed stays committed (exit 1)
"""


class StepwellError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(StepwellError):
    """Wrong before the first byte was read. `problems` holds one line each, shown together."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, ...]]:
        return type(self), self.problems


class InputError(StepwellError):
    """One input cannot be used; the rest of the work goes on."""


class RetryableError(StepwellError):
    """A passing fault: the caller may try the same call again, a bounded number of times."""


class StageError(StepwellError):
    """The stage stops here. Committed units stay committed and are not computed again."""
