"""Interventions and captures in a Lightning run."""
