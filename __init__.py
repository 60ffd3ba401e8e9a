"""Offline feature caches and light head trainers for vision-language-action robotics.

`vla.featurize` runs a frozen backbone once over demonstrations into a store; `vla.heads` trains small heads
straight from the store; `vla.rollout` runs backbone and head together as one policy. The two stages meet only
through `vla.stores`, which needs numpy but no torch.
"""

__version__ = "0.1.0"
