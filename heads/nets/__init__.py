"""The networks that heads are made of."""
