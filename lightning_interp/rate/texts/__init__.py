"""Texts: the user's own, the authors' files, and those inside Python packages."""
