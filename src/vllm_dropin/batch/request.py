"""What the user asks of `vllm-dropin score`, as typed: no file has been looked at yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_dropin.batch.journal import Tally
from vllm_dropin.batch.order import Order

_FEWEST_FOR_SHARE = 100
"""Rows before a share of failed ones says anything."""


@dataclass(frozen=True)
class MaxErrors:
    """When to give up: more failed rows than `count`, or than `share` (0 to 1) of those answered."""

    count: int | None = None
    share: float | None = None

    def passed(self, tally: Tally, *, final: bool = False) -> bool:
        if self.count is not None and tally.failed > self.count:
            return True
        if self.share is None or (tally.rows < _FEWEST_FOR_SHARE and not final):
            return False
        return tally.failed > self.share * tally.rows


@dataclass(frozen=True)
class Replicas:
    """How many engines a Ray cluster runs: `minimum` from the start, more while rows wait for one."""

    minimum: int = 1
    maximum: int = 1


@dataclass(frozen=True)
class ScoreRequest:
    """One command. `url` None: the folder's own engine answers. `columns` None: all. `journal` None: OUTPUT.partial.

    `ray` None: on this machine; "": on the Ray cluster that is there, else on a new one.
    """

    inputs: tuple[str, ...]
    output: str
    format: str | None = None
    output_format: str | None = None
    charset: str | None = None
    prompt_column: str | None = None
    messages_column: str | None = None
    template: str | None = None
    params: tuple[str, ...] = ()
    row_params: tuple[str, ...] = ()
    response_format: str | None = None
    columns: tuple[str, ...] | None = None
    explode: bool = False
    order: Order = "auto"
    ordered: bool = True
    concurrency: int | None = None
    max_errors: MaxErrors = field(default_factory=MaxErrors)
    restart: bool = False
    journal: str | None = None
    summary: bool = False
    url: str | None = None
    model: str | None = None
    ray: str | None = None
    replicas: Replicas = field(default_factory=Replicas)
