"""The process that runs one side of one case: ``python -m benchmarks.worker``.

It reads one JSON object per line and replies to each with one: first a job, then "turn"s. It is a
separate process so that its peak memory is separate, and so that no setting of one side (for
instance of the memory allocator) affects the other. It ends with its input.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cases import Case, case_of

# Several turns of a short operation are timed together on a GPU, because launches are asynchronous.
GPU_UNITS = 100
GPU_STEPS = 5

Answer = dict[str, Any]


def main() -> None:
    """Serve until the input ends."""
    # Libraries print to stderr; only replies go to stdout.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    server = Server()
    for line in sys.stdin:
        answers.write(json.dumps(server.answer(json.loads(line))) + "\n")
        answers.flush()


class Server:
    """Handles the messages of a worker."""

    def __init__(self) -> None:
        self._turn: Callable[[], Answer] | None = None

    def answer(self, message: dict[str, Any]) -> Answer:
        """Process a message.

        Args:
            message: one of {"job": "unit", "model", "data" or "startup", "case", "side", ...}, to
                prepare it; {}, to run it once; {"count": case}, for the operations of a case; and
                {"machine": device}.

        Returns:
            The result, or {"error": reason}.
        """
        try:
            if "job" in message:
                self._turn = start(message)
                return {"ready": True}
            if "count" in message:
                from benchmarks.sides import operations

                return {"operations": operations(case_of(message["count"]))}
            if "machine" in message:
                return machine(message["machine"])
            if self._turn is None:
                raise ValueError("a turn before any job")
            return self._turn()
        except Exception as error:  # the table lists failures, and the other cases continue
            reason = " ".join(str(error).split())
            return {"error": f"{type(error).__name__}: {reason}"[:500]}


def start(message: dict[str, Any]) -> Callable[[], Answer]:
    """Prepare a job; returns a function that runs it once and returns the reply."""
    if message["job"] == "data":
        from benchmarks.data import prepare_data

        return prepare_data(message)
    case = case_of(message["case"])
    began = time.perf_counter()
    import torch

    torch.set_num_threads(case.threads)
    torch_imported = time.perf_counter()
    if message["job"] == "startup":
        return _startup(case, message["side"], torch_imported - began)
    from benchmarks.sides import prepare, prepare_unit, seconds_of

    is_unit = message["job"] == "unit"
    step = prepare_unit(case) if is_unit else prepare(case, message["side"])
    on_gpu = case.device == "cuda"
    times = (GPU_UNITS if is_unit else GPU_STEPS) if on_gpu else 1
    warm = False

    def turn() -> Answer:
        nonlocal warm
        if on_gpu or not warm:
            step()
            warm = True
        seconds = seconds_of(step, case.device, times)
        peak = peak_bytes(case.device)
        if on_gpu:
            torch.cuda.empty_cache()  # the other side needs the memory for its turn
        return {"seconds": seconds, "peak_bytes": peak}

    return turn


def _startup(case: Case, side: str, torch_seconds: float) -> Callable[[], Answer]:
    from benchmarks.sides import build, import_project, load_case_config

    def turn() -> Answer:
        start = time.perf_counter()
        import_project()
        cfg = load_case_config(case)
        imported = time.perf_counter()
        build(case, side, cfg)
        built = time.perf_counter()
        return {
            "torch_import_seconds": torch_seconds,
            "import_seconds": imported - start,
            "build_seconds": built - imported,
        }

    return turn


def peak_bytes(device: str) -> int:
    """Peak memory so far: of the tensors on the GPU, or of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine(device: str) -> Answer:
    """A description of this machine and the versions."""
    import torch

    words = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
    }
    if device == "cuda":
        words["gpu"] = torch.cuda.get_device_name()
    return words


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
