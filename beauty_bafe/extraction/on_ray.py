"""Describe pictures on a Ray cluster, or in several processes on one machine."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..models.precision import fastest_precision
from ..models.runtime import pick_precision, pick_runtime
from .describing import ExtractionJob
from .features import Features
from .local import FeatureExtraction
from .sharing import Shard, SharedRun, Worker


class RayExtraction(FeatureExtraction):
    """FeatureExtraction whose shards are described and written by Ray actors (`extraction=ray`).

    `address`: None starts Ray on this machine, until this process ends; auto, or HOST:PORT, joins a running cluster, all
    machines of which need this package, and the pictures (a folder or a URL) and `features` under the same paths. An
    existing Ray connection of this process is reused. `workers`: number of actors, None for as many as fit. `cpus`, `gpus`:
    of each actor; gpus may be a fraction such as 0.5, None for 1 if `device` is a GPU, else 0. With device=auto the actors
    use GPUs if the cluster has any. Other settings: see FeatureExtraction.

    Vectors are bit-identical to those of one process on the same kind of device. A worker that dies is restarted, and its shard
    described again; if this process dies, the same command continues with the missing shards. Raises ConnectionError if
    no cluster responds, ValueError if a number is not above 0.
    """

    def __init__(
        self,
        features: str,
        address: str | None = None,
        workers: int | None = None,
        cpus: float = 1,
        gpus: float | None = None,
        device: str = "auto",
        precision: str = "auto",
        runtime: str = "auto",
        **settings: Any,
    ) -> None:
        for name, value in {"workers": workers, "cpus": cpus}.items():
            if value is not None and value <= 0:
                raise ValueError(f"extraction.{name}={value}: type a number above 0")
        if settings.pop("devices", None) is not None:
            raise ValueError("extraction.devices applies to one machine; with extraction=ray type extraction.workers=N instead")
        # `_choose_device` finds out whether the cluster has GPUs; until then, and in memory, this machine decides.
        here = "cpu" if device in ("gpu", "cuda") and not torch.cuda.is_available() else device
        super().__init__(features, device=here, precision=precision, runtime=runtime, **settings)
        self.wanted, self.wanted_precision, self.wanted_runtime = device, precision, runtime
        self.address, self.workers, self.cpus, self.gpus = address, workers, cpus, gpus

    def __call__(self, *arguments: Any, **options: Any) -> list[Features]:
        """See FeatureExtraction."""
        import ray

        if not ray.is_initialized():
            self._connect()
        self._choose_device()
        return super().__call__(*arguments, **options)

    def _connect(self) -> None:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts; it would send usage statistics
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors that request no GPU still see the GPUs
        local: dict[str, Any] = {}
        if self.address is None:
            local["include_dashboard"] = False
            os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # on a busy machine its 30 can be too few
        address = "local" if self.address is None else self.address
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
        except Exception as error:  # a timeout raises no specific class
            if self.address is None:
                raise ConnectionError(
                    f"Ray did not start on this machine ({error}); run the same command again, or type extraction=local"
                ) from error
            raise ConnectionError(
                f"no Ray cluster responds at extraction.address={self.address} ({error}); type ray start --head on one of its "
                "machines, or extraction.address=null for this machine only"
            ) from error

    def _choose_device(self) -> None:
        import ray

        there = ray.cluster_resources().get("GPU", 0) > 0
        if self.wanted in ("gpu", "cuda") and not there:
            raise ValueError(f"device={self.wanted}, but Ray sees no GPU in the cluster; type device=cpu or device=auto")
        if self.wanted in ("auto", "gpu", "cuda"):
            self.device = "cuda" if there else "cpu"
        self.devices = [self.device]
        self.runtime = pick_runtime(self.wanted_runtime, self.device)
        self.precision = pick_precision(self.wanted_precision, self.device, self.runtime)
        if self.wanted_precision == "auto" and self.runtime != "openvino" and self.address is not None:
            self.precision = ray.get(ray.remote(num_gpus=self._gpus)(fastest_precision).remote(self.device))

    @property
    def _gpus(self) -> float:
        return (1 if self.device.startswith("cuda") else 0) if self.gpus is None else self.gpus

    def _describe(self, job: ExtractionJob) -> None:
        SharedRun(job).run(self._run)

    def _run(self, worker: Worker, shards: Sequence[Shard]) -> Iterator[tuple[int, int]]:
        import ray
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # our own progress bar replaces them
        there = ray.cluster_resources()
        fitting = int(there.get("CPU", 0) / self.cpus)
        if self._gpus:
            fitting = min(fitting, int(there.get("GPU", 0) / self._gpus))
        size = min(self.workers or max(1, fitting), len(shards))
        if size > fitting:  # Ray would wait forever
            raise ValueError(
                f"{size} workers with {self.cpus} cores and {self._gpus} GPUs each do not fit into the cluster's "
                f"{there.get('CPU', 0):g} cores and {there.get('GPU', 0):g} GPUs; type extraction.workers={max(1, fitting)}, "
                "or smaller extraction.cpus and extraction.gpus"
            )
        # Bytes, as Arrow has no type for a shard; one block per shard, so that workers fetch them one by one.
        rows = [{"shard": pickle.dumps(shard)} for shard in shards]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(ray.put(pickle.dumps(worker)), self.device, max(1, int(self.cpus))),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=self.cpus,
            num_gpus=self._gpus,
        )
        for row in done.iter_rows():
            yield int(row["number"]), int(row["size"])


class _Actor:
    """A ShardDescriber in a Ray process."""

    def __init__(self, worker: Any, device: str, threads: int) -> None:
        import ray

        if device == "cpu":
            torch.set_num_threads(threads)
        self.describe = pickle.loads(ray.get(worker)).start(device, threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shards = [pickle.loads(data) for data in batch["shard"]]
        return {
            "number": np.array([shard.number for shard in shards]),
            "size": np.array([self.describe(shard) for shard in shards]),
        }
