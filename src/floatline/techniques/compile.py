"""torch.compile: Python is traced once, the operations become fused kernels, and fewer intermediates exist.

Compiling layer by layer ("regional" compilation) is the default: layers of one class share one graph, so a model of 28
layers compiles one of them, in a fraction of the time that the whole takes, at the cost of fusing across layers. Each
class of layers has its own limit of recompiles; torch's `module.compile()` gives all modules of a process one together,
and silently compiles nothing of a layer whose class is torch's own (`nn.TransformerEncoderLayer`).

The module is compiled in place, below its name: names in the state dict stay, and forwards that precision islands and
checkpointing replaced are what is traced. Compilation happens in the first call (`TrainStep.warm_up` makes one without
an update), under the contexts of the step, so attention kernels and memory budgets hold for what is compiled.

Another length of batch recompiles once with that dimension dynamic, and then no more (`dynamic=None`). The key-value
cache of Hugging Face models is off in the step, for it makes each layer a case of its own; it serves generation only.

Modes "reduce-overhead" and "max-autotune" replay CUDA graphs, which reuse the memory of the replay before. Gradients
live in it, so a second micro-batch would overwrite the first one's (pytorch#169545): refused with accumulation.

A model of fake tensors (a plan) has nothing to compile for: its forwards run as they are, a note says so.

Not covered: outputs that differ from eager ones in rounding (inductor fuses, and keeps fp32 between fused operations in
half precision); hooks added to submodules afterwards, which compiled code does not see; the compiled code of calls
under `torch.no_grad` and `eval()`, which count as recompiles; graph breaks, which are counted but not mended.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from floatline.errors import ConfigError, did_you_mean
from floatline.hardware import Hardware
from floatline.hardware.legality import Verdict
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.compile_watch import CompileWatch
from floatline.techniques.layers import repeated_layers
from floatline.techniques.placement import holds_fakes

_CUDA_GRAPHS = frozenset({"reduce-overhead", "max-autotune"})
_TRITON_NEEDS = (7, 0)
_NOT_TRACED = "not traced: estimated as eager, which keeps at least as many intermediates"


@dataclass(frozen=True, kw_only=True)
class Compile(Technique):
    """Compile a model for training.

    Args:
        scope: "layers" compiles each repeated layer, "model" the whole.
        mode: Of inductor: "default", "max-autotune-no-cudagraphs" (tries kernels, slow to start), or "reduce-overhead"
            and "max-autotune" with CUDA graphs, for small batches whose launches cost more than their work.
        backend: "inductor", or another that `torch.compiler.list_backends(exclude_tags=())` names.
        dynamic: None makes dimensions dynamic once they change, True from the start, False never.
        fullgraph: Fail at a graph break instead of going on in Python.

    Raises:
        ConfigError: A mode with another backend than inductor.
    """

    name = "compile"
    stage = Stage.COMPILE

    scope: Literal["layers", "model"] = "layers"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    backend: str = "inductor"
    dynamic: bool | None = None
    fullgraph: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "default" and self.backend != "inductor":
            raise self.bad("mode", f"modes belong to backend=inductor, not {self.backend}")

    def supports(self, hardware: Hardware, model: nn.Module) -> Verdict:
        if self.backend != "inductor":
            return Verdict(True, f"backend {self.backend} runs everywhere")
        if hardware.kind == "cpu":
            compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
            found = shutil.which(compiler) is not None
            return Verdict(
                found, f"inductor compiles for CPU with {compiler}, which is {'' if found else 'not '}installed"
            )
        have = f"{hardware.name} is {hardware.generation}, capability {_spell(hardware.capability)}"
        if (hardware.capability or (0, 0)) < _TRITON_NEEDS:
            return Verdict(False, f"inductor's Triton kernels start at capability {_spell(_TRITON_NEEDS)}; {have}")
        if _device(model) == "cuda" and find_spec("triton") is None:
            return Verdict(
                False, "inductor writes its CUDA kernels in Triton, which is not installed (pip install triton)"
            )
        return Verdict(True, f"{have}: Triton kernels start at {_spell(_TRITON_NEEDS)}")

    def conflict_with(self, other: Technique) -> str | None:
        if other.name == "accumulation" and self.mode in _CUDA_GRAPHS:
            return (
                f"the CUDA graphs of mode={self.mode} overwrite the gradients of the micro-batch before; "
                "with accumulation use mode=default or max-autotune-no-cudagraphs"
            )
        return super().conflict_with(other)

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        self._refuse(model)
        modules = {"": model} if self.scope == "model" else repeated_layers(model)
        notes = self._notes(model, modules, hardware)
        if holds_fakes(model):
            return Applied(
                technique=self, touched=tuple(modules), notes=(*notes, _NOT_TRACED), during=partial(_no_cache, model)
            )
        watch = CompileWatch()
        for module, call in _callers(modules.values()):
            compiled = torch.compile(call, **self._settings())
            module._compiled_call_impl = watch.watch(compiled)  # where nn.Module.compile puts it

        def undo() -> None:
            for module in modules.values():
                module.__dict__.pop("_compiled_call_impl", None)

        @contextmanager
        def during() -> Iterator[None]:
            with _no_cache(model), watch.backward():
                yield

        return Applied(
            technique=self,
            touched=tuple(modules),
            undo=undo,
            notes=notes,
            around=self._new_replay if self.mode in _CUDA_GRAPHS and _device(model) == "cuda" else nullcontext,
            during=during,
            facts=watch.facts,
        )

    def _settings(self) -> dict[str, Any]:
        mode = {} if self.mode == "default" else {"mode": self.mode}
        return {"backend": self.backend, "dynamic": self.dynamic, "fullgraph": self.fullgraph, **mode}

    def _refuse(self, model: nn.Module) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if self.backend not in known:
            raise ConfigError(
                f"compile.backend is {self.backend!r}",
                hint=did_you_mean(self.backend, [*torch.compiler.list_backends(), "eager", "aot_eager"]),
            )
        for name, module in model.named_modules():
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise ConfigError(
                    f"{name or type(model).__name__} is compiled already",
                    hint="pass the plain model, without torch.compile(model) or model.compile()",
                )

    def _notes(self, model: nn.Module, modules: dict[str, nn.Module], hardware: Hardware) -> tuple[str, ...]:
        notes = []
        if not modules:
            notes.append(f"no layers repeat in {type(model).__name__}; scope=model compiles it whole")
        if self.mode in _CUDA_GRAPHS and hardware.kind == "cpu":
            notes.append(f"mode={self.mode} replays CUDA graphs, of which a CPU has none")
        elif self.mode in _CUDA_GRAPHS:
            notes.append(f"mode={self.mode}: give one batch an update, a list of micro-batches fails (pytorch#169545)")
        if _cached_configs(model):
            notes.append("the key-value cache is off in the step: with it each layer would be compiled anew")
        return tuple(notes)

    @staticmethod
    def _new_replay() -> AbstractContextManager[Any]:
        """Tell CUDA graphs that the tensors of the micro-batch before are done with."""
        torch.compiler.cudagraph_mark_step_begin()
        return nullcontext()


def _callers(modules: Any) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Yield each module with a function that calls it, of one code object a class.

    Dynamo keeps graphs and counts recompiles by code object. `Module._call_impl`, which `module.compile()` hands over,
    is one for all modules, and lies in a file that dynamo does not trace by itself.
    """
    codes: dict[type[nn.Module], Any] = {}
    for module in modules:
        call = _caller(module)
        call.__code__ = codes.setdefault(type(module), call.__code__.replace(co_name=type(module).__name__))
        yield module, call


def _caller(module: nn.Module) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    return call


def _cached_configs(model: nn.Module) -> list[Any]:
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    return [config for config in configs.values() if getattr(config, "use_cache", False) is True]


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Context in which Hugging Face models build no key-value cache unless asked; their config is restored after."""
    with ExitStack() as stack:
        for config in _cached_configs(model):
            config.use_cache = False
            stack.callback(setattr, config, "use_cache", True)
        yield


def _device(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _spell(capability: tuple[int, int] | None) -> str:
    return ".".join(map(str, capability)) if capability else "unknown"
