"""Several processes that run one command together, on one machine or on many."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Several processes that train together; each is started with the same options, but for --process.

    Attributes:
        coordinator: host:port on the machine of process 0, or "auto" where Slurm, Open MPI, Kubernetes or a TPU pod
            says who takes part.
        processes: how many there are.
        process: the number of this one, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def join(self) -> None:
        """Takes part; before jax looks for its devices.

        Raises:
            ValueError: the three do not go together, or "auto" finds nothing that says who takes part.
        """
        if self.coordinator is None and self.processes is None and self.process is None:
            return
        import jax

        if self.coordinator == "auto":
            try:
                jax.distributed.initialize(num_processes=self.processes, process_id=self.process)
            except ValueError as error:
                raise ValueError(f"--coordinator auto: nothing here says who takes part ({error})") from None
            return
        if self.coordinator is None or self.processes is None or self.process is None:
            raise ValueError("several processes need --coordinator HOST:PORT, --processes and --process")
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"--process {self.process} must be at least 0 and below --processes {self.processes}"
            )
        if not self.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"--coordinator {self.coordinator!r} must be HOST:PORT, or auto")
        jax.distributed.initialize(self.coordinator, self.processes, self.process)
