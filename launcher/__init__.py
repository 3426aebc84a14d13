"""The nnxlaunch launcher: a job spec in, a checked JobSet out, and the verbs to run it."""
