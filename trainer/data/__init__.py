"""Data: sources -> tokens -> packed rows. Batch n is a pure function of (seed, n), for any number of hosts.

data = open_data(config, process_index=0, process_count=1)      # prepares the cache if needed
for n, batch in BatchLoader(data.train, start_step=5, local_rows=[0, 1]): ...
"""

from trainer.data.api import Data, check_tokenizer, open_data
from trainer.data.loader import BatchLoader
from trainer.data.split import EvalSplit, Split, TrainSplit
from trainer.data.state import Difference, differences

__all__ = ["BatchLoader", "Data", "Difference", "EvalSplit", "Split", "TrainSplit", "check_tokenizer", "differences", "open_data"]
