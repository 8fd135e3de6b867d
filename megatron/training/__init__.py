"""The training program: wiring, engine, loop, optimizer, checkpoints, metrics, validation."""
