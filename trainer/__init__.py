"""The nnxlaunch trainer: a pure Flax NNX training program, started by `python -m trainer`."""
