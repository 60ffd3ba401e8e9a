"""The one training loop: optimise, average, checkpoint, log. It knows neither features nor actions."""
