"""Simulators behind one small interface."""
