"""The contract between the stages: what a store holds, how it is committed, read and verified. No torch here."""
