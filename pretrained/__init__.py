"""Weights of published networks: found in a folder or the hub's cache, digested, loaded whole or refused."""
