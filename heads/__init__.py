"""Stage 2: trainable heads, from windows of a store to actions."""
