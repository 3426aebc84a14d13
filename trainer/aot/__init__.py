"""Compile the train step for devices that are not here; read memory and collectives out of the result."""
