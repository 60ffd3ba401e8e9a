"""Stage 1: raw demonstrations through a frozen backbone into a store."""
