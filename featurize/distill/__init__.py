"""Students trained from cached features against a teacher's embeddings: what `vla distill` makes."""
