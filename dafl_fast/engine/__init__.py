"""The training engine: frozen teacher, replay bank, training step, loop and checkpoints."""
