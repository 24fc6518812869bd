"""Interventions, captures and looks at the model in a Lightning run."""
