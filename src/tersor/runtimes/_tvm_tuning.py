"""Search of schedules for TVM within a budget of time.

The space of schedules, and the evolutionary search in it, are MetaSchedule's; who has a turn, the
measuring and the clock are ours. Candidates are compiled and timed in this process: workers that
start anew, import TVM and are waited for would take longer than what they measure.

Source:
    Shao et al., Tensor Program Optimization with Probabilistic Programs, arXiv:2205.13603; Zheng et
    al., Ansor, arXiv:2006.06762, section 6: the time goes to the operators that take most of the
    network's. We deviate: no cost model, since learning one takes longer than measuring these few
    candidates; and an operator that did not become faster waits the longer, the more often.
"""

import contextlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

_ROUND = 8
"""Candidates of one operator before the next one has its turn."""
_POPULATION, _SAMPLED = 16, 6
"""Schedules that one round chooses from; drawn anew, at least. TVM's 512 and 50 take minutes."""
_HOPELESS = 2.0
"""A candidate so many times slower than the best is timed once only."""
_GAIN = 0.99
"""A round that leaves more than this share of an operator's time has brought nothing."""
_TURNS, _CONTEST_S = 10, 1.0
"""Runs of each network at least when they are compared, and seconds of comparing."""


class Operator:
    """An operator of the network (as TVM fused them), and the best schedule found for it."""

    name: str
    count: int
    default_s: float
    best_s: float
    best: Any
    tried: int

    def __init__(self, task: Any, target: Any, scheduled: Callable[[Any], Any]) -> None:
        """Time the default schedule.

        Args:
            task: TVM's description of the operator.
            target: TVM's target.
            scheduled: Applies the default schedule; it may change what it is given.
        """
        from tvm.s_tir import meta_schedule

        self.name, self.count, self.target = str(task.task_name), int(task.weight), target
        self.module = task.dispatched[0]
        draw = np.random.default_rng(0)
        self.given = [
            _drawn(draw, [int(size) for size in each.shape], str(each.dtype))
            for each in meta_schedule.arg_info.ArgInfo.from_prim_func(self.module["main"])
        ]
        self.expected: list[np.ndarray] | None = None
        self.best_s, self.best, self.tried, self.idle = float("inf"), None, 0, 0
        with target:
            default = scheduled(self.module.clone())
        self.default_s = self.best_s = self.measured(default)
        self.search: Any = None

    @property
    def urgency(self) -> float:
        """Seconds that it takes of the network's, less after rounds that brought nothing."""
        return self.count * self.best_s / (1 + self.idle)

    def measured(self, module: Any) -> float:
        """Compile and time a schedule, in seconds.

        Raises:
            ArithmeticError: it computes something else than the default schedule.
        """
        import tvm

        kernel = tvm.compile(module, self.target).jit()
        arrays = [tvm.runtime.tensor(array) for array in self.given]
        kernel["main"](*arrays)
        made = [array.numpy() for array in arrays]
        if self.expected is None:
            self.expected = made
        elif not all(same(a, b) for a, b in zip(made, self.expected, strict=True)):
            raise ArithmeticError("other outputs than those of the default schedule")

        def times(repeat: int) -> Any:
            timed = kernel.time_evaluator("main", tvm.cpu(), number=1, repeat=repeat)
            return timed(*arrays).results

        once = float(times(1)[0])
        return once if once > _HOPELESS * self.best_s else min(once, *times(5))

    def round(self, end: float) -> bool:
        """Try some candidates until `end`; return whether there are more."""
        from tvm.s_tir import meta_schedule

        if self.search is None:
            self.search = _search(self)
        context, database, workload = self.search
        before = self.best_s
        candidates = context.generate_measure_candidates()
        results = []
        for candidate in candidates or ():
            if time.monotonic() >= end:
                return True
            self.tried += 1
            try:
                seconds = self.measured(candidate.sch.mod)
            except Exception as error:  # a schedule that cannot be built is only no candidate
                results.append(meta_schedule.runner.RunnerResult(None, str(error)[:100]))
                continue
            results.append(meta_schedule.runner.RunnerResult([seconds], None))
            record = meta_schedule.database.TuningRecord(
                candidate.sch.trace, workload, [seconds], self.target, candidate.args_info
            )
            database.commit_tuning_record(record)
            if seconds < self.best_s:
                self.best_s, self.best = seconds, record
        if not candidates:
            return False
        context.notify_runner_results(candidates, results)
        self.idle = 0 if self.best_s < _GAIN * before else self.idle + 1
        return True


def tuned(
    module: Any, target: Any, seconds: float, scheduled: Callable[[Any], Any]
) -> tuple[Any, dict[str, Any]]:
    """Search for so many seconds, and put in the schedules that are faster than the default ones.

    Args:
        module: Relax, fused, without schedules. Not modified.
        target: TVM's target.
        seconds: After them no candidate is begun.
        scheduled: Applies the default schedule.

    Returns:
        The network, in which what was not reached or got no faster has no schedule yet; and what
        was tried.
    """
    from tvm import relax
    from tvm.s_tir import meta_schedule

    began = time.monotonic()
    end = began + seconds
    found: list[Operator] = []
    skipped: dict[str, str] = {}
    for task in meta_schedule.relax_integration.extract_tasks(module, target):
        if time.monotonic() >= end:
            break
        try:
            found.append(Operator(task, target, scheduled))
        except Exception as error:  # such as a free shape; it keeps its schedule
            skipped[str(task.task_name)] = str(error).strip()[-200:]
    open_ones = list(found)
    while open_ones and time.monotonic() < end:
        urgent = max(open_ones, key=lambda operator: operator.urgency)
        try:
            more = urgent.round(end)
        except Exception as error:  # such as no schedule at all; the best so far stays
            more, skipped[urgent.name] = False, str(error).strip()[-200:]
        if not more:
            open_ones.remove(urgent)
    best = meta_schedule.database.MemoryDatabase()
    for operator in found:
        if operator.best is not None:
            best.commit_workload(operator.module)
            best.commit_tuning_record(operator.best)
    with target, best:
        made = relax.transform.MetaScheduleApplyDatabase(enable_warning=False)(module.clone())
    return made, {
        "seconds": seconds,
        "spent_seconds": time.monotonic() - began,
        "candidates": sum(operator.tried for operator in found),
        "improved": sum(operator.best is not None for operator in found),
        "skipped": skipped,
        "operators": [
            {
                "name": operator.name,
                "count": operator.count,
                "candidates": operator.tried,
                "default_ms": 1000 * operator.default_s,
                "tuned_ms": 1000 * operator.best_s,
            }
            for operator in found
        ],
    }


def compared(default: Any, changed: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Run two compiled networks in turns.

    Args:
        default: With the default schedules.
        changed: With those that were found.
        inputs: Arrays in the order of the networks' inputs.

    Returns:
        Milliseconds of both (medians), and which one to keep.
    """
    import tvm
    from tvm import relax

    arrays = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in inputs.values()]
    runs = [relax.VirtualMachine(each, tvm.cpu())["main"] for each in (default, changed)]
    first, second = (_arrays(run(*arrays)) for run in runs)
    agree = all(same(a, b) for a, b in zip(second, first, strict=True))
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + _CONTEST_S
    while len(times[0]) < _TURNS or time.perf_counter() < end:
        for run, into in zip(runs, times, strict=True):
            began = time.perf_counter()
            run(*arrays)
            into.append(1000 * (time.perf_counter() - began))
    default_ms, tuned_ms = (statistics.median(each) for each in times)
    kept = "tuned" if agree and tuned_ms < default_ms else "default"
    return {"outputs_agree": agree, "default_ms": default_ms, "tuned_ms": tuned_ms, "kept": kept}


def same(made: np.ndarray, expected: np.ndarray) -> bool:
    """Tell whether two arrays differ by no more than another order of summation explains.

    Half of a float's digits, relative to the largest value; integers by 1, which a rounding is.
    """
    floats = np.issubdtype(expected.dtype, np.floating)
    a, b = made.astype(np.float64), expected.astype(np.float64)
    finite = np.abs(b[np.isfinite(b)])
    scale = float(np.sqrt(np.finfo(expected.dtype).eps)) if floats else 0.0
    allowed = scale * float(finite.max(initial=0)) if floats else 1.0
    return bool(np.allclose(a, b, rtol=0, atol=allowed, equal_nan=True))


def _search(operator: Operator) -> tuple[Any, Any, Any]:
    """Begin an evolutionary search; return it, its records, and the operator's entry in them."""
    from tvm.s_tir import meta_schedule

    # tiles, vectors, threads and unrolling: rules that need none of TVM's tensor intrinsics
    space = meta_schedule.space_generator.PostOrderApply(
        sch_rules=meta_schedule.schedule_rule.ScheduleRule.create("llvm"),
        postprocs=meta_schedule.postproc.Postproc.create("llvm"),
        mutator_probs=meta_schedule.mutator.Mutator.create("llvm"),
    )
    strategy = meta_schedule.search_strategy.EvolutionarySearch(
        population_size=_POPULATION,
        init_measured_ratio=0.6,
        init_min_unmeasured=_SAMPLED,
        genetic_num_iters=1,
        eps_greedy=0.25,
    )
    with _without_intrinsics():
        context = meta_schedule.TuneContext(
            mod=operator.module,
            target=operator.target,
            space_generator=space,
            search_strategy=strategy,
            task_name=operator.name,
            rand_state=1,
            num_threads=1,
        )
    database = meta_schedule.database.MemoryDatabase()
    workload = database.commit_workload(operator.module)
    most = 1_000_000  # the clock ends it
    context.pre_tuning(most, _ROUND, context.generate_design_space(), database)
    return context, database, workload


@contextlib.contextmanager
def _without_intrinsics() -> Iterator[None]:
    """Keep TVM from importing its tensor intrinsics, of GPUs mostly: half a minute of parsing."""
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]


def _drawn(draw: np.random.Generator, shape: list[int], dtype: str) -> np.ndarray:
    """Draw floats from [0, 1); integers are 0, which is a valid index of anything."""
    kind = np.dtype(dtype)
    if np.issubdtype(kind, np.floating):
        return draw.random(shape).astype(kind)
    return np.zeros(shape, kind)


def _arrays(made: Any) -> list[np.ndarray]:
    return [part.numpy() for part in ([made] if hasattr(made, "numpy") else made)]
