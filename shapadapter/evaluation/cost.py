"""What explaining costs in time and memory, against the base model's plain forward pass, measured side by side."""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from shapadapter.core.errors import ShapleyError
from shapadapter.core.statistics import Interval
from shapadapter.evaluation.plan import ALWAYS, ONE_PASS, Plan, image_of
from shapadapter.explanation.passes import Predicted

REPEATS = 11
"""How often a call of a few forward passes is timed; one of many is timed once."""


def costs(model: nn.Module, plan: Plan, batch: Predicted) -> dict[str, dict[str, Interval]]:
    """Time and peak memory over those of the plain pass: of the one pass on a batch, of other methods on one image.

    The one pass is measured with LoRA merged, as one would deploy it, and against the base model alone.
    """
    plain, merged = base_alone(model), with_merged_lora(model)
    inputs, single = batch.inputs, image_of(batch.inputs, 0)
    passing = {name: value for name, value in inputs.items() if name not in single}
    target = int(batch.classes[0, 0])
    found = {ONE_PASS: compare(lambda: plain(**inputs), lambda: merged(**inputs))}
    for name in plan.names:
        if name not in (ONE_PASS, *ALWAYS):
            found[name] = compare(
                lambda: plain(**single, **passing),
                lambda name=name: plan.explain(name, model, single, [target], 0),  # type: ignore[misc]
            )
    return found


def compare(plain: Callable[[], Any], other: Callable[[], Any]) -> dict[str, Interval]:
    """The ratio of the median times of two calls, made in turns, and of the memory that they take at most."""
    plain()
    start = seconds_of(plain)
    repeats = REPEATS if seconds_of(other) < 20 * start else 1
    times = [(seconds_of(plain), seconds_of(other)) for _ in range(repeats)]
    slow, quick = median(b for _, b in times), median(a for a, _ in times)
    memory = peak_memory_of(other) / peak_memory_of(plain)
    return {
        name: Interval(ratio, math.nan, math.nan, 1) for name, ratio in (("time", slow / quick), ("memory", memory))
    }


def base_alone(model: nn.Module) -> nn.Module:
    """A copy of the model without any adapter."""
    other: Any = copy.deepcopy(model)
    if isinstance(other, PeftModel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it predicts with an untrained classifier: only time counts
            return other.unload().eval()
    other.disable_adapters()
    return other.eval()


def with_merged_lora(model: nn.Module) -> nn.Module:
    """A copy with LoRA merged in the weights, where that can be done."""
    other: Any = copy.deepcopy(model)
    if isinstance(other, PeftModel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it may be merged already
            try:
                other.merge_adapter()
            except ShapleyError:  # weights that are transformed before they are used
                return model
    return other.eval()


def seconds_of(run: Callable[[], Any]) -> float:
    """How long a call takes, with all that it has given an accelerator to do."""
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_of(run: Callable[[], Any]) -> float:
    """The most bytes that a call had allocated at a time beyond those before it: of the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report its start and stop on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return float(most)
