"""Count what torch.compile does in the calls of one model: graphs, graph breaks, recompiles and the time they take.

Dynamo keeps its counters for the whole process (`torch._dynamo.utils.counters`, `get_compilation_metrics`). The watch
reads them before and after each compiled call and adds up the difference, so that other compiled models do not count.
A call that compiles nothing pays for reading four numbers.

When a function has been compiled `torch._dynamo.config.recompile_limit` times (8), torch runs it uncompiled for every
further kind of input, and says so in its log only. The watch turns that into a warning that names the guard.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from floatline.errors import FloatlineWarning

Mark = tuple[int, int, int, Any]


class CompileWatch:
    """Counters of one compiled model.

    Attributes:
        graphs: Graphs handed to the backend; layers of one class share theirs.
        recompiles: How often a guard failed and a function was compiled again for other inputs.
        graph_breaks: Places where Python had to take over.
        seconds: Time spent in compiling, backward graphs included.
        reasons: The failed guards of the recompiles, in their order.
    """

    def __init__(self) -> None:
        self.graphs = self.recompiles = self.graph_breaks = 0
        self.seconds = 0.0
        self.reasons: list[str] = []
        self._names: dict[str, str] = {}

    def watch(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return `compiled` with its calls counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before = _mark()
            try:
                return compiled(*args, **kwargs)
            finally:
                after = _mark()
                if after[:3] != before[:3]:
                    self._add(before, after)

        return counted

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Context of forward and backward: backward graphs of watched functions may be compiled only there."""
        last = _mark()[3]
        yield
        for metric in _since(last):
            if metric.is_forward is False and _function(metric) in self._names:
                self.seconds += (metric.duration_us or 0) / 1e6

    def facts(self) -> dict[str, float]:
        """Return the counters, as `Applied.facts` has them."""
        return {
            "graphs": self.graphs,
            "recompiles": self.recompiles,
            "graph_breaks": self.graph_breaks,
            "compile_s": self.seconds,
        }

    def _add(self, before: Mark, after: Mark) -> None:
        self.graphs += after[1] - before[1]
        self.graph_breaks += after[2] - before[2]
        for metric in _since(before[3]):
            if metric.is_forward is False:
                continue
            self.seconds += (metric.duration_us or 0) / 1e6
            name = self._names.setdefault(_function(metric), metric.co_name or "a function")
            if metric.recompile_reason is None:
                continue
            self.reasons.append(_guard(metric.recompile_reason))
            if "recompile limit" in (metric.fail_reason or "").lower():
                self._warn(name)
            else:
                self.recompiles += 1

    def _warn(self, name: str) -> None:
        import torch

        warnings.warn(
            f"compile: {name} was compiled {torch._dynamo.config.recompile_limit} times, for other inputs it runs "
            f"uncompiled from now on; the guard that failed last: {self.reasons[-1]}. "
            "Use dynamic=null or true, or pad batches to a few lengths",
            FloatlineWarning,
            stacklevel=4,
        )


def _mark() -> Mark:
    from torch._dynamo.utils import counters, get_compilation_metrics

    metrics = get_compilation_metrics()
    return (
        counters["frames"]["total"],
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        metrics[-1] if metrics else None,
    )


def _since(last: Any) -> list[Any]:
    """Return the compilation metrics after `last`; torch keeps the latest 64."""
    from torch._dynamo.utils import get_compilation_metrics

    metrics = get_compilation_metrics()
    place = next((index for index, metric in enumerate(metrics) if metric is last), -1)
    return metrics[place + 1 :]


def _function(metric: Any) -> str:
    """Return the number of the compiled function: "4" of compile id "4/1"."""
    return str(metric.compile_id).split("/")[0]


def _guard(reason: str) -> str:
    """Return a recompile's reason without the number of the graph and the user's stack."""
    return reason.split(": ", 1)[-1].split("\n")[0].strip()
