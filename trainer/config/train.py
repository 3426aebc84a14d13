"""TrainConfig: everything the trainer reads, in one document."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.config.base import Node, NonNegativeInt, PositiveInt
from trainer.config.compiler import Compiler
from trainer.config.data import Data
from trainer.config.diloco import DiLoCo
from trainer.config.mesh import Mesh
from trainer.config.model import Model
from trainer.config.optimizer import AdamW, Loss, Optimizer, Schedule
from trainer.config.pipeline import Pipeline
from trainer.config.run import Batch, Checkpoint, Distributed, Ema, Eval, Metrics, Profiler
from trainer.config.sharding import Sharding


class TrainConfig(Node):
    """The document mounted into every pod and read by `python -m trainer --config FILE`."""

    run_directory: Annotated[str, Field(min_length=1)]
    """Checkpoints, metrics and logs of this run; a local folder or gs://. The same directory resumes."""
    steps: PositiveInt
    """Optimizer steps of the whole run."""
    seed: Annotated[NonNegativeInt, Field(lt=2**31)] = 0
    model: Model
    batch: Batch
    mesh: Mesh = Mesh()
    pipeline: Pipeline | None = None
    diloco: DiLoCo | None = None
    sharding: Sharding = Sharding()
    optimizer: Optimizer = AdamW()
    schedule: Schedule
    loss: Loss = Loss()
    data: Data
    ema: Ema | None = None
    """Keep a moving average of the parameters, for evaluation, export and decoding."""
    eval: Eval | None = None
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    profiler: Profiler | None = None
    compile_cache: str | None = None
    """Folder or gs:// path of JAX's persistent compile cache; process 0 writes."""
    compiler: Compiler = Compiler()
    distributed: Distributed = Distributed()

    def of_size(self, sequences: int) -> TrainConfig:
        """The run at one of `batch.sizes`, as if every step had it."""
        return self.model_copy(update={"batch": self.batch.of_size(sequences)}) if self.batch.ramp_up else self
