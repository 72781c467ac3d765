"""The toy world: a table-top universe small enough to know every answer (see world.py, pretrain.py)."""
