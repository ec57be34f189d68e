"""The training engine: frozen teacher, replay bank, one step, the loop around it, checkpoints."""
