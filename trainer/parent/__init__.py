"""The process that `python -m trainer` is: PID 1 of a container. Standard library only.

It starts the trainer proper as its child and outlives it, because JAX ends a process whose peers died with a C++
abort, which runs no Python and, as PID 1, would even hide its own signal. `process` is the parent, `link` the
child's side of the pipe between them, `verdict` what an ending means, `evidence` what is kept of it. Where the run
directory is on gs://, `uploader` is a third process, because clients of storage are no standard library: what it was given
by the parent (`uploads`) is sent however the others end.

What the child says over the pipe decides more than how it dies: once it has announced an exit code, a crash while
it takes itself apart changes nothing; until it has announced `training`, there is nothing unsaved, so a SIGTERM
ends it on the spot with exit code 75, in the middle of a compile if need be.
"""
