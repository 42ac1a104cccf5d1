"""Every error of the product. Each has an exit code for the process, a short code for programs and a remedy for people.

Exit codes follow sysexits.h: 0 asked stop, 65 too many failed rows, 70 restart budget spent, 74 input or output,
75 drain overrun, 78 bad configuration or model.

    DropinError (70)
    ├── ConfigurationError (78)     what the user wrote: folder, parameters, flags
    │   ├── FlagError               an engine flag
    │   └── AddressError            the public address can't be bound
    ├── TableError (78)             rows that can't be read as a table
    │   └── EncodingError           bytes that are not text
    ├── ModelError (78)             weights that can't be served
    ├── HookError (78)              custom.py failed
    ├── DownloadError (78)          the hub did not give the model
    ├── PlatformError (78)          the platform refuses what push asks, or what it builds fails
    ├── EngineError (70)            the engine would not stay up
    ├── InputOutputError (74)       disk or remote storage
    │   └── EngineAwayError         the server that answers rows is gone for now
    ├── FailedRowsError (65)        more rows failed than allowed
    └── DrainOverrunError (75)      requests were cut off at the drain deadline
"""

from __future__ import annotations


class DropinError(Exception):
    """Base of all errors that a user is meant to read.

    `message` says what is wrong and where (file, key, line or row); `remedy` says what to do about it.
    """

    exit_code = 70
    code = "internal"

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message


class ConfigurationError(DropinError):
    """The model folder, a runtime parameter, a flag or the environment is wrong. Never retried."""

    exit_code = 78
    code = "configuration"


class FlagError(ConfigurationError):
    """An engine flag is unknown, malformed, or belongs to us."""

    code = "flag"


class AddressError(ConfigurationError):
    """The public address can't be bound."""

    code = "address"


class TableError(DropinError):
    """The rows to score can't be read as a table: no header, a missing column, a cell that never ends."""

    exit_code = 78
    code = "table"


class EncodingError(TableError):
    """The bytes of a table are not text in its charset."""

    code = "encoding"


class ModelError(DropinError):
    """The weights can't be served: missing, truncated, corrupt or incomplete."""

    exit_code = 78
    code = "model"


class HookError(DropinError):
    """custom.py failed, was killed or ran past its deadline."""

    exit_code = 78
    code = "hook"


class DownloadError(DropinError):
    """The hub did not give the model."""

    exit_code = 78
    code = "download"


class PlatformError(DropinError):
    """The platform refuses a call (no right, no such thing, a value it does not take), or a build or test failed."""

    exit_code = 78
    code = "platform"


class EngineError(DropinError):
    """The engine would not start, or its restart budget is spent."""

    exit_code = 70
    code = "engine"


class InputOutputError(DropinError):
    """A disk is full or remote storage is gone; what was committed is intact."""

    exit_code = 74
    code = "io"


class EngineAwayError(InputOutputError):
    """The server that answers rows can't be reached; later it may."""

    code = "away"


class FailedRowsError(DropinError):
    """More rows failed than was allowed; every answer is kept."""

    exit_code = 65
    code = "rows"


class DrainOverrunError(DropinError):
    """Requests were still running when the drain deadline passed."""

    exit_code = 75
    code = "drain"
