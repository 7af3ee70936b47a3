"""Measure, and keep the figures as plain rows that become JSON."""
