"""Where it is computed: the device mesh and the layout of tensors over it."""
