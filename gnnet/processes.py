"""Work that is shared out to several processes of this machine, each with a device of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

import torch

# Packages that are slow to import. The server may search other folders than this process, so it imports none of ours.
_SLOW = {"matplotlib.pyplot", "pytorch_lightning", "torch", "torchmetrics", "torchvision.transforms.v2"}
_SOCKET = 70  # longest path of the folder for temporary files that leaves room for the name of the server's socket
Devices = torch.device | str | Sequence[torch.device]  # one: this process; several: a process each

T = TypeVar("T")
R = TypeVar("R")


def devices_of(device: torch.device | str, count: int) -> list[torch.device]:
    """A device for each of `count` processes: GPUs one each; a CPU is shared by all. `auto` is a GPU if there is one.

    Raises:
        ValueError: if there are not as many.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if count < 1:
        raise ValueError(f"devices={count}; expected 1 or more")
    if device.type != "cuda" or count == 1:
        return [device] * count
    if count > torch.cuda.device_count():
        raise ValueError(f"devices={count}, and there are {torch.cuda.device_count()} GPUs; expected so many at most")
    return [torch.device("cuda", number) for number in range(count)]


def as_list(device: Devices) -> list[torch.device]:
    """The device of each process."""
    return [torch.device(device)] if isinstance(device, torch.device | str) else list(device)


def share_out(
    start: Callable[[torch.device], Callable[[T], R]], items: Iterable[T], device: Devices
) -> Iterator[tuple[int, R]]:
    """Do a piece of work for each item; give each item's number and its result as soon as it is done.

    With one device, this process does all in their order. With several, as many processes are started, which end
    with this one, also if it is killed. Each has its share of this process' threads, or `OMP_NUM_THREADS` where that
    is set.

    Args:
        start: called once in each process with its device, gives what does the work for an item. With several devices
            it can be pickled, as can items and results.
        items: any number. They are asked for as they are needed: by one device when what it did before was taken,
            by several when less than twice as many wait.
        device: one, or one for each process.

    Raises:
        RuntimeError: if a process was killed.
        Exception: what the work raised; its cause shows the traceback in the other process.
    """
    devices, items = as_list(device), iter(items)
    first = list(islice(items, len(devices)))
    devices, items = devices[: max(1, len(first))], chain(first, items)
    if len(devices) == 1:
        work = start(devices[0])
        for number, item in enumerate(items):
            yield number, work(item)
        return
    # CUDA does not survive a fork, so the processes are forks of a server that imports packages and does nothing else.
    method = "forkserver" if len(tempfile.gettempdir()) <= _SOCKET else "spawn"
    context, threads = multiprocessing.get_context(method), torch.get_num_threads()
    context.set_forkserver_preload(sorted(_SLOW & sys.modules.keys()))
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, threads // len(devices))
    # Pickled here, as torch would otherwise hand over each tensor by an open file, of which there may be few.
    setup = pickle.dumps(start), [str(device) for device in devices], context.Value("i", 0), threads
    waiting, running = enumerate(items), dict[Future[bytes], int]()
    pool = ProcessPoolExecutor(len(devices), context, _begin, setup)
    try:
        while True:
            for number, item in islice(waiting, 2 * len(devices) - len(running)):
                running[pool.submit(_do, pickle.dumps(item))] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), pickle.loads(future.result())
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"one of the {len(devices)} processes that share the work was killed (for want of memory, the system's "
            "log tells)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Process:
    """What one of several processes does: set by `_begin`, in that process."""

    start: Callable[[], Callable[[Any], Any]]
    work: Callable[[Any], Any] | None = None


def _begin(start: bytes, devices: Sequence[str], count: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with count.get_lock():
        device, count.value = devices[count.value], count.value + 1
    _Process.start = lambda: pickle.loads(start)(torch.device(device))


def _do(item: bytes) -> bytes:
    if _Process.work is None:  # here, so that the parent hears of an error
        _Process.work = _Process.start()
    return pickle.dumps(_Process.work(pickle.loads(item)))


def _end_with_parent() -> None:
    """Otherwise a process whose parent was killed waits for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
