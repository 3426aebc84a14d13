"""`python -m trainer smoke`: does this installation train, save, resume in a fresh process, and resume exactly?

Two runs of one config on 8 CPU devices: one is left alone, the other gets SIGTERM after its first steps and goes on
in a new process. Every loss and every saved tensor of the two must be equal, bit for bit. Needs no accelerator, no
network and nothing writable but the temporary directory. Standard library only: the trainers are subprocesses.
"""

from trainer.smoke.run import main

__all__ = ["main"]
