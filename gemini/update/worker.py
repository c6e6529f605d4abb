"""The thread that updates chunks while others compute: most urgent first, one tile after the other.

The thread waits in native code, without the interpreter lock, and takes it for some ten microseconds a tile.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from gemini.errors import GeminiError, ModelError, WorkerError
from gemini.profile.listeners import RunListeners
from gemini.update.job import UpdateJob
from gemini.update.pipeline import TilePipeline

__all__ = ["UpdateWorker"]


@dataclass(eq=False)
class _Progress:
    """A job and how far it has come; guarded by the shared state's lock."""

    job: UpdateJob
    distance: int
    next_tile: int = 0
    """Place in `job.tiles` of the first that has not been started."""
    num_updated: int = 0

    @property
    def num_under_way(self) -> int:
        return self.next_tile - self.num_updated

    @property
    def is_started(self) -> bool:
        return self.next_tile == len(self.job.tiles)


@dataclass(eq=False)
class _Shared:
    """What the thread and its users share. The thread holds on to this alone, so that the worker can be collected."""

    pipeline: TilePipeline
    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: list[_Progress] = field(default_factory=list)
    """Jobs with tiles that have not been started."""
    progress: dict[int, _Progress] = field(default_factory=dict)
    """All jobs that somebody may still ask about, by id."""
    failure: BaseException | None = None
    is_closing: bool = False
    busy_s: float = 0.0
    is_idle: bool = False


class UpdateWorker:
    """Runs update jobs in a thread of its own; the thread starts with the first job, or `start`.

    A job stays known until it is forgotten, which `wait` and `cancel` do.

    Args:
        pipeline: closed with the worker; used by nobody else.
        listeners: told of every wait.
    """

    def __init__(self, pipeline: TilePipeline, listeners: RunListeners) -> None:
        self.stall_s = 0.0
        """Seconds that callers have waited for updates."""
        self._listeners = listeners
        self._shared = _Shared(pipeline)
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._stop: Callable[[], object] = lambda: None

    @property
    def is_idle(self) -> bool:
        """Whether the thread waits for something to do."""
        return self._shared.is_idle

    @property
    def busy_s(self) -> float:
        """Seconds during which there was something to update, or to write."""
        return self._shared.busy_s

    @property
    def tile_numel(self) -> int:
        """Elements in a tile."""
        return self._shared.pipeline.tile_numel

    def start(self) -> None:
        """Make sure that the thread runs.

        Raises:
            WorkerError: the system refuses the thread, or an update before has failed otherwise than by I/O.
            OffloadIOError: an update before has failed.
        """
        self._check_process()
        with self._shared.changed:
            self._check_failure()
        if self._thread is not None:
            return
        thread = threading.Thread(target=_serve, args=(self._shared,), name="gemini-update", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise WorkerError(
                f"cannot start the thread that updates weights: {error}; nothing has been updated: raise the limits on "
                "processes (ulimit -u, pids.max) and memory, then take the step again"
            ) from error
        self._thread = thread
        self._stop = weakref.finalize(self, _stop, self._shared, thread)

    def submit(self, job: UpdateJob, *, distance: int) -> None:
        """Queue a job.

        Args:
            job: at least one tile; not touched by others until it is done.
            distance: lower comes first, tile by tile.

        Raises:
            WorkerError: as `start`.
            OffloadIOError: as `start`.
        """
        assert job.tiles
        self.start()
        shared = self._shared
        with shared.changed:
            progress = _Progress(job, distance)
            shared.progress[id(job)] = progress
            shared.waiting.append(progress)
            shared.changed.notify_all()

    def is_updated(self, job: UpdateJob) -> bool:
        """Return whether `wait` would return, or raise, at once."""
        with self._shared.changed:
            return self._shared.failure is not None or self._is_updated(job)

    def wait(self, job: UpdateJob) -> None:
        """Block until the host sees all results of a job, and forget it; writes to disk may still be under way.

        Args:
            job: as submitted; one that is forgotten already is done.

        Raises:
            OffloadIOError: this or another update failed; some tiles have been updated and some have not.
            WorkerError: the thread has ended otherwise.
        """
        self._check_process()
        shared = self._shared
        start = time.perf_counter()
        with shared.changed:
            self._wait_for(lambda: self._is_updated(job) or shared.failure is not None)
            self._check_failure()
            shared.progress.pop(id(job), None)
        end = time.perf_counter()
        self.stall_s += end - start
        self._listeners.stalled("update", job.spec.chunk_id, start, end)

    def adjust(self, job: UpdateJob, *, distance: int, refreshes: torch.Tensor | None) -> bool:
        """Give a job another distance and, if that is not too late, a copy to refresh.

        Args:
            job: as submitted.
            distance: as in `submit`.
            refreshes: becomes the job's if no tile of it has been started.

        Returns:
            Whether `refreshes` has been taken.
        """
        with self._shared.changed:
            self._check_failure()
            progress = self._shared.progress[id(job)]
            progress.distance = distance
            if progress.next_tile:
                return False
            job.refreshes = refreshes
            return True

    def release_gradients(self, job: UpdateJob) -> None:
        """Let go of the buffer a job reads its gradients from; tiles not yet started will read them from disk.

        Args:
            job: as submitted, or forgotten.
        """
        shared = self._shared
        with shared.changed:
            job.grad_slot = None
            progress = shared.progress.get(id(job))
            if progress is not None:
                self._wait_for(lambda: progress.num_under_way == 0 or shared.failure is not None)

    def cancel(self, job: UpdateJob) -> None:
        """Stop a job whose results all went ahead, as if it had never been; waits for its tiles under way.

        Args:
            job: as submitted, or forgotten.
        """
        shared = self._shared
        with shared.changed:
            progress = shared.progress.get(id(job))
            if progress is not None:
                if progress in shared.waiting:
                    shared.waiting.remove(progress)
                self._wait_for(lambda: progress.num_under_way == 0 or shared.failure is not None)
                del shared.progress[id(job)]
        for home in (job.state, job.working):
            home.forget_ahead()

    def close(self) -> None:
        """Drop what has not been started, finish the rest, end the thread and close the pipeline. Idempotent."""
        if os.getpid() == self._pid:
            self._stop()
            self._shared.pipeline.close()

    def _is_updated(self, job: UpdateJob) -> bool:
        progress = self._shared.progress.get(id(job))
        return progress is None or progress.num_updated == len(job.tiles)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait with the lock held, in slices, so that signals such as Ctrl-C are handled between them."""
        while not condition():
            if self._thread is None or not self._thread.is_alive():
                raise WorkerError("the thread that updates weights has ended before its work was done")
            self._shared.changed.wait(0.1)

    def _check_failure(self) -> None:
        failure = self._shared.failure
        if isinstance(failure, GeminiError):
            raise failure
        if failure is not None:
            raise WorkerError(f"the thread that updates weights has ended: {failure!r}") from failure

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ModelError(
                "this process was forked from the one that trains: the threads that update weights exist only there; "
                "use the engine in the process that made it"
            )


def _serve(shared: _Shared) -> None:
    """Run jobs until asked to stop or something fails; then nothing more is started."""
    try:
        _run_jobs(shared)
    except BaseException as error:
        with suppress(RuntimeError):  # a device that has failed fails every wait
            shared.pipeline.abandon()
        with shared.changed:
            shared.failure = error
            shared.waiting.clear()
            shared.changed.notify_all()


def _run_jobs(shared: _Shared) -> None:
    pipeline = shared.pipeline
    while True:
        with shared.changed:
            while not shared.waiting and not pipeline.is_busy and not shared.is_closing:
                shared.is_idle = True
                shared.changed.wait()
                shared.is_idle = False
            if shared.is_closing and not pipeline.is_busy:
                return
            next_tile = None if shared.is_closing else _take_tile(shared)
        start = time.perf_counter()
        if next_tile is not None:
            pipeline.start(*next_tile)
        else:
            pipeline.push()
        with shared.changed:
            shared.busy_s += time.perf_counter() - start
            for job in pipeline.take_updated():
                shared.progress[id(job)].num_updated += 1
                shared.changed.notify_all()


def _take_tile(shared: _Shared) -> tuple[UpdateJob, int] | None:
    """Return the next tile of the most urgent job, None if all have been started; needs the lock."""
    if not shared.waiting:
        return None
    progress = min(shared.waiting, key=lambda waiting: waiting.distance)
    tile = progress.job.tiles[progress.next_tile]
    progress.next_tile += 1
    if progress.is_started:
        shared.waiting.remove(progress)
    return progress.job, tile


def _stop(shared: _Shared, thread: threading.Thread) -> None:
    with shared.changed:
        shared.is_closing = True
        shared.changed.notify_all()
    if thread is not threading.current_thread():  # the garbage collector may have come by in any thread
        thread.join()
