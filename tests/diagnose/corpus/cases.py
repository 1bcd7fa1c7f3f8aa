"""The corpus's two lists, and the decorators that fill them.

A fault is a function that builds a program: it returns (forward, model) or (forward, model, optimizer). The line that
is to be found ends with the comment `# HERE`. What is expected of the finding stands in the decorator.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FAULTS: list["Fault"] = []
HEALTHY: list["Healthy"] = []


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A program and what is wrong with it; None is not checked.

    Attributes:
        build: () -> (forward, model) or (forward, model, optimizer).
        phase: As a Finding has it.
        op: Likewise; a set where backends differ.
        cause: Name of the cause.
        module: Dotted name.
        tensor: Name of the bad tensor.
        samples: Its bad samples.
        cured: What the counterfactual should say.
    """

    build: Callable[[], Any]
    phase: str
    op: str | set[str]
    cause: str
    module: str
    tensor: str | None
    samples: tuple[int, ...] | None
    cured: bool | str | None

    @property
    def name(self) -> str:
        return self.build.__name__

    @property
    def line(self) -> int | None:
        """Number of the marked line, None where no line of the user's runs."""
        lines, first = inspect.getsourcelines(self.build)
        marked = [first + place for place, line in enumerate(lines) if line.rstrip().endswith("# HERE")]
        assert len(marked) <= 1, self.name
        return marked[0] if marked else None


@dataclass(frozen=True)
class Healthy:
    """A program with nothing wrong."""

    build: Callable[[], Any]

    @property
    def name(self) -> str:
        return self.build.__name__


ANY = "any"


def fault(phase, op, cause, module="", tensor=None, samples=None, cured=ANY):
    """Decorator: this program goes wrong so."""

    def enlist(build):
        FAULTS.append(Fault(build=build, phase=phase, op=op, cause=cause, module=module, tensor=tensor,
                            samples=samples, cured=cured))  # fmt: skip
        return build

    return enlist


def healthy(build):
    """Decorator: there is nothing wrong with this program."""
    HEALTHY.append(Healthy(build))
    return build
